"""Checkpoints of the published layout: read from a directory or a hub, or made of random weights.

Imports jinaclip_export.towers and errors.
"""
