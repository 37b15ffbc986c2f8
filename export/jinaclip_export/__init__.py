"""From a checkpoint of jina-clip-v2 to a bundle, and the certificates of its precisions.

Imports jinaclip, jinaclip_engines and torch.
"""
