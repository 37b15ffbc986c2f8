"""How a case is measured: in this process, in new ones, or through a server.

Imports jinaclip_bench.sides, cases and measuring.
"""
