"""Tests of jinaclip.backends, and of the CUDA operators in runtime/c-library."""
