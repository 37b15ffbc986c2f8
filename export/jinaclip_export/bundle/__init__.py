"""What `jinaclip export` writes: graphs, manifest and golden vectors.

Imports jinaclip_export.towers, checkpoint and onnx_export, and jinaclip_engines.
"""
