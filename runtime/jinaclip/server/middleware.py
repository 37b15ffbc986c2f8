"""What every route has: keys, request ids, a limit to the body, times, errors in one form. No input is ever logged."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from jinaclip.bundle.files import safe_name
from jinaclip.server.admission import Room
from jinaclip.server.errors import Problem, problem_of
from jinaclip.server.metrics import Metrics

logger = logging.getLogger("jinaclip.server")

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]
KEY_ASKED = {"WWW-Authenticate": "Bearer"}


class Handling:
    """Wraps handlers.

    Args:
        keys: one of them must come as a bearer token; () lets everyone in.
        provenance: sent with every answer.
        max_body_bytes: of one request.
        max_bodies_bytes: of all requests that are not answered yet.
        body_timeout_s: for a body to come.
    """

    def __init__(
        self, metrics: Metrics, *, keys: Sequence[str], provenance: str, max_body_bytes: int, max_bodies_bytes: int,
        body_timeout_s: float,
    ) -> None:  # fmt: skip
        self._metrics, self._provenance = metrics, provenance
        self._keys = [key.encode() for key in keys]
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s
        self._bodies = Room("bytes of requests", max_bodies_bytes)

    def __call__(self, handler: Handler, *, open_to_all: bool = False) -> Handler:
        """A handler with what all have.

        Args:
            open_to_all: answer without a key.
        """

        async def handle(request: Request) -> Response:
            request_id = safe_name(request.headers.get("x-request-id", "")[:80])
            request_id = uuid.uuid4().hex if request_id == "unnamed" else request_id
            start = time.monotonic()
            try:
                if not open_to_all:
                    self._require_key(request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:  # whatever it is, the client gets an answer in our form
                problem = problem_of(error)
                if problem.status == 500:
                    logger.exception("request %s failed", request_id)
                response = self.json(problem.body(), problem.status, problem.headers)
            seconds = time.monotonic() - start
            self._metrics.requests.labels(request.url.path, response.status_code).inc()
            self._metrics.seconds.labels(request.url.path).observe(seconds)
            logger.info(
                "%s %s %s %d %.3f s", request_id, request.method, request.url.path, response.status_code, seconds
            )
            response.headers["X-Request-Id"] = request_id
            return response

        return handle

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[Any]:
        """The decoded JSON of a request, read no further than the limit; its room is held while the block lasts.

        Raises:
            Problem: 400, 408, 413 or 415. Overloaded: other requests hold too much.
        """
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, "unsupported_media_type", f"the body is {kind:.80}, expected application/json")
        taken = 0
        content = bytearray()
        try:
            try:
                async with asyncio.timeout(self._body_timeout_s):
                    self._check_size(int(request.headers.get("content-length", 0)))
                    async for chunk in request.stream():
                        self._check_size(len(content) + len(chunk))
                        self._bodies.take(len(chunk))
                        taken += len(chunk)
                        content += chunk
            except TimeoutError:
                raise Problem(408, "slow_body", f"the body did not come within {self._body_timeout_s:g} s",
                              headers={"Connection": "close"}) from None  # fmt: skip
            try:
                decoded = orjson.loads(content)
            except orjson.JSONDecodeError as error:
                raise Problem(400, "invalid_json", f"the body is no JSON: {error}") from None
            del content
            yield decoded
        finally:
            self._bodies.give_back(taken)

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        """An answer; numpy arrays may be in it."""
        content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
        sent = {"X-Jinaclip-Provenance": self._provenance, **(headers or {})}
        return Response(content, status_code=status, headers=sent, media_type="application/json")

    async def no_route(self, request: Request, error: Exception) -> Response:
        """What stands in for a path or method that is not there."""
        assert isinstance(error, HTTPException)
        what = {404: "there is nothing at this path", 405: f"{request.method} is not what this path takes"}
        words = what.get(error.status_code, str(error.detail))
        problem = Problem(error.status_code, "no_such_route", f"{words}; /docs tells what there is",
                          headers=dict(error.headers or {}))  # fmt: skip
        return self.json(problem.body(), problem.status, problem.headers)

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            limit = self._max_body_bytes
            raise Problem(413, "body_too_large", f"the body has more than {limit} bytes; send fewer items at once",
                          headers={"Connection": "close"})  # fmt: skip

    def _require_key(self, request: Request) -> None:
        """Raises Problem: no key, or another one. All are compared, in constant time."""
        if not self._keys:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Problem(401, "missing_key", "this server asks for a key; send Authorization: Bearer KEY",
                          headers=KEY_ASKED)  # fmt: skip
        given = token.strip().encode("utf-8", "replace")
        if not max([hmac.compare_digest(given, key) for key in self._keys]):
            raise Problem(401, "wrong_key", "this key is none of this server's", headers=KEY_ASKED)
