"""Tests of jinaclip.cli: the verbs of the runtime."""
