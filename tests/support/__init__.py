"""Modules that several test files import, and the programs of `make parity` and `make certificates`."""
