"""Every error jinaclip raises, and what each one becomes over HTTP and in C.

    JinaClipError                       HTTP   C
    ├── InputError (ValueError)         422    JINACLIP_ERROR_INPUT     the caller's text, image or argument
    ├── BundleError                     500    JINACLIP_ERROR_BUNDLE    the bundle is damaged or does not fit
    ├── BackendError (RuntimeError)     500    JINACLIP_ERROR_BACKEND   inference failed
    │   ├── BackendMissing              500    JINACLIP_ERROR_BACKEND   a library or device is not there
    │   ├── EngineMismatch              500    JINACLIP_ERROR_BACKEND   an engine made for another machine
    │   └── SelfTestFailed              500    JINACLIP_ERROR_BACKEND   a session returned wrong vectors
    └── Overloaded                      429    JINACLIP_ERROR_OVERLOADED   the queue is full

jinaclip_export derives ExportError and CertificationError. A message says what was found, what was expected
and what to do; the command line prints it as one line and exits with 1.
"""

from __future__ import annotations


class JinaClipError(Exception):
    """Base of every error that jinaclip raises on purpose."""


class InputError(JinaClipError, ValueError):
    """The caller's text, image or argument cannot be used.

    Attributes:
        index: position of the offending item in the caller's list, or None.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class BundleError(JinaClipError):
    """The bundle is missing, damaged, too new, or lacks what was asked of it."""


class BackendError(JinaClipError, RuntimeError):
    """Inference could not be set up or failed."""


class BackendMissing(BackendError):
    """The library, provider or device that was asked for is not available."""


class EngineMismatch(BackendError):
    """A prepared engine was made for another machine or library version."""


class SelfTestFailed(BackendError):
    """A session did not reproduce the bundle's golden vectors; it is not used."""


class Overloaded(JinaClipError):
    """The queue is full; try again later."""


# One table for every outer surface: error class -> (HTTP status, C status name). Subclasses inherit.
STATUS: dict[type[JinaClipError], tuple[int, str]] = {
    InputError: (422, "JINACLIP_ERROR_INPUT"),
    BundleError: (500, "JINACLIP_ERROR_BUNDLE"),
    BackendError: (500, "JINACLIP_ERROR_BACKEND"),
    Overloaded: (429, "JINACLIP_ERROR_OVERLOADED"),
    JinaClipError: (500, "JINACLIP_ERROR"),
}


def status_of(error: JinaClipError) -> tuple[int, str]:
    """(HTTP status, C status name) of an error, by its nearest class in STATUS."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    raise TypeError(f"{type(error).__name__} is not a JinaClipError")
