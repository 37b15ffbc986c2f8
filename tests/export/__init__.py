"""Tests of jinaclip_export: export, parity with public implementations, and certificates."""
