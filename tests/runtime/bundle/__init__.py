"""Tests of jinaclip.bundle: how a bundle is read, and which ones are refused."""
