"""Errors of the passes and builders; the tree is in jinaclip.errors."""

from __future__ import annotations

from jinaclip.errors import BackendError


class PassError(BackendError):
    """A graph is not of the form that a pass rewrites."""
