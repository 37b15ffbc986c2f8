"""Preprocessing: texts to token ids, and images to uint8 pixels.

Imports only jinaclip.errors. Independent of bundles and backends.
"""
