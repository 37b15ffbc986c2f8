"""The bundle: the directory that `jinaclip export` writes, with its manifest, engines, certificates and self-test
results.

Imports jinaclip.errors and jinaclip.preprocessing. Does not open graphs.
"""
