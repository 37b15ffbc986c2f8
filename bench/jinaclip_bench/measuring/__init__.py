"""Timing, the facts of the machine, and what measurements need: child processes and a cache.

Imports jinaclip_bench.errors.
"""
