"""Errors of the passes and builders; the tree is in jinaclip.errors."""

from __future__ import annotations

from jinaclip.errors import BackendError


class PassError(BackendError):
    """A graph is not of the form that a pass rewrites."""


class ProfileError(BackendError):
    """Optimisation profiles are not of their form."""


class BuildError(BackendError):
    """An engine could not be built, or was built into something else than what was asked."""
