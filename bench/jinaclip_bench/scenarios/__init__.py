"""The kinds of measurements: in this process, in new processes, or through a server.

Imports jinaclip_bench.sides, cases and measuring.
"""
