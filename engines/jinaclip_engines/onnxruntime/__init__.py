"""Prepared graphs for ONNX Runtime.

Imports jinaclip_engines.passes, graph and store.
"""
