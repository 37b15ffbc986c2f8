"""Errors of the exporter, subclasses of `JinaClipError`."""

from __future__ import annotations

from jinaclip.errors import JinaClipError


class ExportError(JinaClipError):
    """The checkpoint cannot be exported; nothing was written.

    CheckpointError ── the checkpoint is invalid or incomplete
    ParityError     ── the exported graph's output differs from torch's
    """


class CheckpointError(ExportError):
    """A file, setting or tensor of the checkpoint is missing, or differs from the published layout."""


class ParityError(ExportError):
    """The exported graph's output differs from torch's by more than the tolerance."""


class CertificationError(JinaClipError):
    """A precision missed a bound, or nothing could be certified."""
