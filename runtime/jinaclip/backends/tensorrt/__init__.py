"""Sessions of engines that `jinaclip build` made with TensorRT or TensorRT-RTX.

The one folder that imports these libraries. Imports jinaclip.bundle, the files of backends that describe sessions and
machines, and backends.cuda; nothing of ONNX Runtime.
"""
