"""The table of cases, their inputs, and the settings of a run.

Imports jinaclip_bench.measuring and errors.
"""
