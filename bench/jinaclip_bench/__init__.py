"""Benchmarks of jinaclip and of its alternatives.

Imports all other packages.
"""
