"""Records of a run, the bounds on their figures, and reports.

Imports jinaclip_bench.measuring and cases.
"""
