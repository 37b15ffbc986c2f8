"""The output of `jinaclip export`: graphs, manifest and golden vectors.

Imports jinaclip_export.towers, checkpoint and onnx_export, and jinaclip_engines.
"""
