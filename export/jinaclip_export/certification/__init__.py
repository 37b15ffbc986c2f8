"""The measurements of `jinaclip certify`: inputs, references, metrics, and their table and plot.

Imports jinaclip_export.towers, checkpoint, onnx_export and bundle.
"""
