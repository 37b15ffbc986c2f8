"""What a client is told when something cannot be done: one JSON form for every status.

{"detail": text, "error": {"message": text, "type": …, "param": …, "code": …}}: clients of the hosted API read the
first, OpenAI's the second.
"""

from __future__ import annotations

from typing import Any

from jinaclip.errors import InputError, JinaClipError, Overloaded, status_of

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    422: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error",
}  # fmt: skip


class Problem(JinaClipError):
    """An answer that is no success.

    Attributes:
        status: of HTTP.
        code: a word for programs.
        param: the field of the request that it is about, or None.
        index: of the item that it is about, or None.
        headers: to send with it.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, index: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.index = status, code, param, index
        self.headers = headers or {}

    def at(self, field: str, index: int) -> Problem:
        """The same of one item of a field of the request."""
        return Problem(self.status, self.code, f"{field}[{index}] {self}", param=field, index=index)

    def error(self) -> dict[str, Any]:
        """The object that stands under "error"."""
        found = {"message": str(self), "type": TYPES[self.status], "param": self.param, "code": self.code}
        return found if self.index is None else {**found, "index": self.index}

    def body(self) -> dict[str, Any]:
        return {"detail": str(self), "error": self.error()}


def invalid(param: str, message: str, *, code: str = "invalid_value", index: int | None = None) -> Problem:
    """A value of the request that cannot be used: 422."""
    return Problem(422, code, message, param=param, index=index)


def problem_of(error: Exception) -> Problem:
    """Any error as a client is told of it: ours in its own words, another's without any."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Overloaded):
        return Problem(429, "overloaded", str(error), headers={"Retry-After": "1"})
    if isinstance(error, InputError):
        return Problem(422, "invalid_input", str(error), param="input")
    if isinstance(error, JinaClipError):
        return Problem(status_of(error)[0], "backend_error", str(error))
    return Problem(500, "internal_error", "the server failed; its log tells more under this request's id")
