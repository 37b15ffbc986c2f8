"""Sessions of ONNX Runtime, on the CPU and on NVIDIA GPUs, and the graphs that `jinaclip build` prepared for them.

The one folder that imports the onnxruntime module. Imports jinaclip.bundle, the files of backends that describe
sessions and machines, and backends.cuda; nothing of TensorRT.
"""
