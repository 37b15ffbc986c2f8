"""Engines of TensorRT and TensorRT-RTX: shapes, compilation, and the check of what was compiled.

Imports jinaclip_engines.passes, graph, store and errors.
"""
