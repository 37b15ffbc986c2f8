"""Measurements of jinaclip against what people run today."""
