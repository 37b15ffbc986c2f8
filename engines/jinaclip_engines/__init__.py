"""Make other precisions, prepared graphs and TensorRT engines from a bundle's graphs.

Imports jinaclip and onnx; never torch.
"""
