"""Graphs of other precisions than fp32: which blocks take them, and how large values get.

Imports jinaclip_engines.graph.
"""
