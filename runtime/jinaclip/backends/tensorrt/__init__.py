"""Sessions for engines that `jinaclip build` made with TensorRT or TensorRT-RTX.

Only this folder imports these libraries. It imports jinaclip.bundle, the shared files of backends, and backends.cuda,
but nothing of ONNX Runtime.
"""
