"""Rewrites for ONNX Runtime's CUDA provider, with and without jinaclip's operators.

Imports the packages that jinaclip_engines.passes may import, and its other files.
"""
