"""ONNX Runtime sessions on CPUs and NVIDIA GPUs, and the prepared graphs that `jinaclip build` makes for them.

Only this folder imports the onnxruntime module. It imports jinaclip.bundle, the shared files of backends, and
backends.cuda, but nothing of TensorRT.
"""
