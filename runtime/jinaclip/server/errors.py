"""Error responses: one JSON format for every status.

    {"detail": text, "error": {"message": text, "type": …, "param": …, "code": …}}

Clients of the hosted API read "detail", OpenAI's clients read "error".
"""

from __future__ import annotations

from typing import Any

from jinaclip.errors import InputError, JinaClipError, Overloaded, status_of

# The error type of a status, in the words of OpenAI's API. Other statuses are "invalid_request_error".
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Problem(JinaClipError):
    """An error that is sent to the client as an HTTP response.

    Attributes:
        status: the HTTP status.
        code: a machine-readable error code.
        param: the request field that caused the error, or None.
        index: the position of the item that caused the error, or None.
        headers: additional response headers.
    """

    index: int | None = None

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    def at(self, field: str, index: int) -> Problem:
        """The same error for one item of a request field; the message gets the prefix "field[index] "."""
        problem = Problem(self.status, self.code, f"{field}[{index}] {self}", param=field)
        problem.index = index
        return problem

    def error(self) -> dict[str, Any]:
        """The value of "error" in the response body."""
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return error if self.index is None else {**error, "index": self.index}

    def body(self) -> dict[str, Any]:
        return {"detail": str(self), "error": self.error()}


def invalid(param: str, message: str, *, code: str = "invalid_value") -> Problem:
    """A 422 error for an invalid value in the request."""
    return Problem(422, code, message, param=param)


def problem_of(error: Exception) -> Problem:
    """Convert an exception to an error response; the text of unexpected exceptions is not sent to the client."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Overloaded):
        return Problem(429, "overloaded", str(error), headers={"Retry-After": "1"})
    if isinstance(error, InputError):
        return Problem(422, "invalid_input", str(error), param="input")
    if isinstance(error, JinaClipError):
        return Problem(status_of(error)[0], "backend_error", str(error))
    return Problem(500, "internal_error", "Internal server error; see the server's log for this request id.")
