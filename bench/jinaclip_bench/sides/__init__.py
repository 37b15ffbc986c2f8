"""What is measured side by side: torch, the publisher's kind of graph, servers and their clients.

Imports jinaclip_bench.cases and measuring.
"""
