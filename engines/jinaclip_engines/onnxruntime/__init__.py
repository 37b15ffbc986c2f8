"""Graphs prepared for ONNX Runtime on this machine.

Imports jinaclip_engines.passes, graph and store.
"""
