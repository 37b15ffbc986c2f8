"""The directory that `jinaclip export` writes: its manifest, its files, and what is kept beside it.

Imports jinaclip.errors and jinaclip.preprocessing. Opens no graph.
"""
