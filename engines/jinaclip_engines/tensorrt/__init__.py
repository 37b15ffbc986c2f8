"""Engines of TensorRT and TensorRT-RTX: profiles, compilation, and checks of the compiled plan.

Imports jinaclip_engines.passes, graph, store and errors.
"""
