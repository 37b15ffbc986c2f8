"""What `jinaclip certify` measures: inputs, references, figures, and the table and plot of them.

Imports jinaclip_export.towers, checkpoint, onnx_export and bundle.
"""
