"""Rewrites for ONNX Runtime's CUDA provider, with jinaclip's operators and without.

Imports what jinaclip_engines.passes may import, and its other files.
"""
