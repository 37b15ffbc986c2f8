"""Errors of the passes and builders. jinaclip.errors has the base classes."""

from __future__ import annotations

from jinaclip.errors import BackendError


class PassError(BackendError):
    """A graph does not have the structure that a pass expects."""


class ProfileError(BackendError):
    """A file of optimisation profiles is missing or invalid."""


class BuildError(BackendError):
    """An engine could not be built, or the built engine does not meet the requirements."""
