"""Tests of runtime/jinaclip: a folder for each of its folders, and the model, packing and threads here."""
