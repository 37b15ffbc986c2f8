"""Tests of jinaclip_engines: graph passes, precisions, and TensorRT engines."""
