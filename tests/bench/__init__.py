"""Tests of jinaclip_bench: cases, records and reports. No test depends on how long anything takes."""
