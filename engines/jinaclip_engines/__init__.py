"""From a bundle's graphs to what a machine runs: other precisions, prepared graphs and TensorRT engines.

Imports jinaclip and onnx; never torch.
"""
