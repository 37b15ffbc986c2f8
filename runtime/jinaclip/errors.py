"""All errors that jinaclip raises, with the HTTP status and the C status that correspond to each.

    JinaClipError                       HTTP   C
    ├── InputError (ValueError)         422    JINACLIP_ERROR_INPUT     the caller's text, image or argument
    ├── BundleError                     500    JINACLIP_ERROR_BUNDLE    the bundle is damaged or incompatible
    ├── BackendError (RuntimeError)     500    JINACLIP_ERROR_BACKEND   inference failed
    │   ├── BackendMissing              500    JINACLIP_ERROR_BACKEND   a library or device is not available
    │   ├── EngineMismatch              500    JINACLIP_ERROR_BACKEND   an engine was built for another machine
    │   └── SelfTestFailed              500    JINACLIP_ERROR_BACKEND   a session returned wrong vectors
    └── Overloaded                      429    JINACLIP_ERROR_OVERLOADED   the queue is full

jinaclip_export adds the subclasses ExportError and CertificationError. A message says what was found, what was
expected and what to do. The command line prints it on one line and exits with status 1.
"""

from __future__ import annotations


class JinaClipError(Exception):
    """Base class of all errors that jinaclip raises deliberately."""


class InputError(JinaClipError, ValueError):
    """The caller's text, image or argument cannot be used.

    Attributes:
        index: position of the invalid item in the caller's list, or None.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class BundleError(JinaClipError):
    """The bundle is missing, damaged, too new, or lacks a requested tower or precision."""


class BackendError(JinaClipError, RuntimeError):
    """Inference failed or could not be set up."""


class BackendMissing(BackendError):
    """The requested library, provider or device is not available."""


class EngineMismatch(BackendError):
    """An engine was built for another machine or library version."""


class SelfTestFailed(BackendError):
    """A session did not reproduce the bundle's golden vectors and is not used."""


class Overloaded(JinaClipError):
    """The queue is full; try again later."""


# Error class -> (HTTP status, C status name). Subclasses inherit the entry of their nearest base class.
STATUS: dict[type[JinaClipError], tuple[int, str]] = {
    InputError: (422, "JINACLIP_ERROR_INPUT"),
    BundleError: (500, "JINACLIP_ERROR_BUNDLE"),
    BackendError: (500, "JINACLIP_ERROR_BACKEND"),
    Overloaded: (429, "JINACLIP_ERROR_OVERLOADED"),
    JinaClipError: (500, "JINACLIP_ERROR"),
}


def status_of(error: JinaClipError) -> tuple[int, str]:
    """(HTTP status, C status name) of an error, from its nearest base class in STATUS."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    raise TypeError(f"{type(error).__name__} is not a JinaClipError")
