"""Checkpoints in the published layout, read from a directory or a hub, or generated with random weights.

Imports jinaclip_export.towers and errors.
"""
