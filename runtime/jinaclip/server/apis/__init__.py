"""Forms of requests and answers: the hosted API's, and those of marketplaces.

Imports jinaclip.embeddings, jinaclip.errors and server.errors. Runs no model.
"""
