"""CUDA: detection of GPUs, memory, streams and graphs, and one thread per GPU for ONNX Runtime.

Imports only jinaclip.errors. Used by the sessions of ONNX Runtime and TensorRT.
"""
