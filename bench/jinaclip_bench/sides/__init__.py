"""The sides of a benchmark: torch, a graph like the publisher's, servers and their clients.

Imports jinaclip_bench.cases and measuring.
"""
