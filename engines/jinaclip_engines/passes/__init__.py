"""Rewrites of a graph for one backend. A rewrite does not change the graph's outputs.

Imports jinaclip_engines.graph, errors and precision.
"""
