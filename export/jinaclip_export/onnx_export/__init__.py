"""Export of the torch towers to ONNX graphs, and the comparison of the graphs with torch.

Imports jinaclip_export.towers and errors.
"""
