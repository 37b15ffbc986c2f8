"""Tests of jinaclip.preprocessing: images and texts."""
