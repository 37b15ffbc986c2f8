"""Tests of the repository: import rules, types, documentation, examples, and the Containerfile."""
