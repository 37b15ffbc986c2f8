"""Measurements of jinaclip beside what people use otherwise.

Imports all other packages.
"""
