"""Records of a run, the bounds they are held to, and reports of them.

Imports jinaclip_bench.measuring and cases.
"""
