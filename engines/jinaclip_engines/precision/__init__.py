"""Conversion of fp32 graphs to fp16 and int8: calibration, selection of blocks, and the rewrites.

Imports jinaclip_engines.graph.
"""
