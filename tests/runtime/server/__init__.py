"""Tests of jinaclip.server: the HTTP API, the queue and the fetcher of images."""
