"""The two towers in torch, and their configuration.

Imports jinaclip_export.errors.
"""
