"""Torch towers to ONNX graphs, compared with torch before they are written.

Imports jinaclip_export.towers and errors.
"""
