"""Errors of the benchmarks, in jinaclip's tree."""

from __future__ import annotations

from jinaclip.errors import JinaClipError


class BenchError(JinaClipError):
    """A measurement cannot be made, or would not measure what it says."""


class NotCompiled(BenchError):
    """torch.compile fails on a side, which cannot be measured."""
