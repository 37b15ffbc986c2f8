"""Timing, information about the machine, child processes and a cache of models.

Imports jinaclip_bench.errors.
"""
