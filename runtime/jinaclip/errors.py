"""All errors that jinaclip raises, with the HTTP status of each and its name in a C interface (none exists yet).

    JinaClipError                       HTTP   C
    ├── InputError (ValueError)         422    JINACLIP_ERROR_INPUT     the caller's text, image or argument
    ├── BundleError                     500    JINACLIP_ERROR_BUNDLE    the bundle is damaged or incompatible
    ├── BackendError (RuntimeError)     500    JINACLIP_ERROR_BACKEND   inference failed
    │   ├── BackendMissing              500    JINACLIP_ERROR_BACKEND   a library or device is not available
    │   ├── EngineMismatch              500    JINACLIP_ERROR_BACKEND   an engine was built for another machine
    │   └── SelfTestFailed              500    JINACLIP_ERROR_BACKEND   a session returned wrong vectors
    └── Overloaded                      429    JINACLIP_ERROR_OVERLOADED   the queue is full

jinaclip_export adds the subclasses ExportError and CertificationError. A message says what was found, what was
expected and what to do. The command line prints the message on one line and exits with status 1.
"""

from __future__ import annotations


class JinaClipError(Exception):
    """Base class of all errors that jinaclip raises deliberately.

    Examples:
        >>> try:
        ...     ClipModel("missing/")
        ... except JinaClipError as error:
        ...     print(error)
        missing is not a directory; expected a bundle made by `jinaclip export`
    """


class InputError(JinaClipError, ValueError):
    """The caller's text, image or argument cannot be used.

    Attributes:
        index: position of the invalid item in the caller's list, or None.

    Examples:
        >>> try:
        ...     model.encode_image(["coffee.jpg", "missing.jpg"])
        ... except InputError as error:
        ...     print(error.index)
        1
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class BundleError(JinaClipError):
    """The bundle is missing, damaged, too new, or lacks a requested tower or precision.

    Examples:
        >>> try:
        ...     ClipModel("bundle/", precision="int8")
        ... except BundleError as error:
        ...     print(error)
        bundle has no int8 text graph (it has: fp32); use one of these
    """


class BackendError(JinaClipError, RuntimeError):
    """Inference failed or could not be set up.

    Examples:
        >>> model = ClipModel("bundle/")
        >>> model.close()
        >>> try:
        ...     model.encode_text("a cat")
        ... except BackendError as error:
        ...     print(error)
        this model is closed; open a new ClipModel
    """


class BackendMissing(BackendError):
    """The requested library, provider or device is not available.

    Examples:
        >>> try:
        ...     model = ClipModel("bundle/", device="cuda")
        ... except BackendMissing:
        ...     model = ClipModel("bundle/", device="cpu")
    """


class EngineMismatch(BackendError):
    """An engine was built for another machine or library version.

    Examples:
        >>> try:
        ...     model = ClipModel("bundle/", backend="tensorrt")
        ... except (BackendMissing, EngineMismatch):
        ...     model = ClipModel("bundle/", backend="onnxruntime")
    """


class SelfTestFailed(BackendError):
    """The vectors of a graph differ from the bundle's golden vectors (the expected vectors of a few inputs).

    Examples:
        >>> try:
        ...     model = ClipModel("bundle/", self_test="always")
        ... except SelfTestFailed as error:
        ...     print(f"the model computes wrong vectors: {error}")
    """


class Overloaded(JinaClipError):
    """The queue is full; try again later. Only the server raises this error. It responds with HTTP status 429.

    Examples:
        >>> status_of(Overloaded("the queue is full"))
        (429, 'JINACLIP_ERROR_OVERLOADED')
    """


# Error class -> (HTTP status, C status name). Subclasses inherit the entry of their nearest base class.
STATUS: dict[type[JinaClipError], tuple[int, str]] = {
    InputError: (422, "JINACLIP_ERROR_INPUT"),
    BundleError: (500, "JINACLIP_ERROR_BUNDLE"),
    BackendError: (500, "JINACLIP_ERROR_BACKEND"),
    Overloaded: (429, "JINACLIP_ERROR_OVERLOADED"),
    JinaClipError: (500, "JINACLIP_ERROR"),
}


def status_of(error: JinaClipError) -> tuple[int, str]:
    """The HTTP status and the C status of an error, from its nearest base class in STATUS.

    Args:
        error: the error.

    Returns:
        (HTTP status, name of the C status).

    Raises:
        TypeError: `error` is not a JinaClipError.

    Examples:
        >>> status_of(InputError("the text is empty"))
        (422, 'JINACLIP_ERROR_INPUT')
    """
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    raise TypeError(f"{type(error).__name__} is not a JinaClipError")
