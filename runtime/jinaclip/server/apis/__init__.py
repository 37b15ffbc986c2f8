"""Formats of requests and responses: those of the hosted API and of marketplaces.

Imports jinaclip.embeddings, jinaclip.errors and server.errors. Runs no model.
"""
