"""Errors of the exporter, in jinaclip's tree."""

from __future__ import annotations

from jinaclip.errors import JinaClipError


class ExportError(JinaClipError):
    """The checkpoint cannot be exported; nothing was written.

    CheckpointError ── the checkpoint itself is wrong or incomplete
    ParityError     ── the exported graph does not reproduce torch
    """


class CheckpointError(ExportError):
    """A file, setting or tensor of the checkpoint is missing or not as published."""


class ParityError(ExportError):
    """The exported graph's output is too far from torch's."""


class CertificationError(JinaClipError):
    """A precision missed a bound, or there is nothing that could be certified."""
