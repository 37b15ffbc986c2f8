"""From texts and pictures to what the towers take: token ids, and uint8 pixels.

Imports only jinaclip.errors. Knows no bundle and no backend.
"""
