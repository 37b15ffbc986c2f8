"""Checkpoint to bundle: the torch side of jinaclip."""
