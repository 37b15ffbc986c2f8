"""Rewrites of a graph for one backend, each with equal outputs.

Imports jinaclip_engines.graph, errors and precision.
"""
