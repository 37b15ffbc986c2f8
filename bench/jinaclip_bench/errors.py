"""Errors of the benchmarks, subclasses of `JinaClipError`."""

from __future__ import annotations

from jinaclip.errors import JinaClipError


class BenchError(JinaClipError):
    """A measurement failed, or its result would be invalid."""


class NotCompiled(BenchError):
    """torch.compile failed for a side, so the side cannot be measured."""
