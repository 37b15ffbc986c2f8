"""CUDA devices: which there are, their memory, streams and graphs, and the thread that a process uses each with.

Imports jinaclip.errors alone. Used by the sessions of ONNX Runtime and of TensorRT.
"""
