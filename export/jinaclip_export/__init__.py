"""Export jina-clip-v2 checkpoints to bundles, and certify the precisions of a bundle.

Imports jinaclip, jinaclip_engines and torch.
"""
