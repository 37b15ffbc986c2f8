"""What all routes share: API keys, request ids, body limits, latency metrics and error responses.

The content of requests is never logged.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from jinaclip.bundle.files import safe_name
from jinaclip.server.admission import Limiter
from jinaclip.server.apis.marketplaces import Marketplace
from jinaclip.server.errors import Problem, problem_of
from jinaclip.server.metrics import Metrics

logger = logging.getLogger("jinaclip.server")

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]
KEY_REQUIRED = {"WWW-Authenticate": "Bearer"}
CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        keys: the accepted API keys, sent by clients as bearer tokens; () disables authentication.
        max_body_bytes: the largest request body, in bytes.
        max_bodies_bytes: the largest total size of the bodies of requests that are not answered yet, in bytes.
        body_timeout_s: the longest time to receive a body, in seconds.
        marketplace: the marketplace whose paths are served, or None. Without keys, only its paths, /health and /ready
            are served.
    """

    keys: tuple[str, ...] = ()
    max_body_bytes: int = 64 << 20
    max_bodies_bytes: int = 256 << 20
    body_timeout_s: float = 60.0
    marketplace: Marketplace | None = None


class Handling:
    """Wraps route handlers.

    Args:
        metrics: the counters to update.
        settings: the API keys and the limits on bodies.
        provenance: the provenance id, sent in a header of every response.
    """

    def __init__(self, metrics: Metrics, settings: ServerSettings, provenance: str) -> None:
        self._metrics, self._settings, self._provenance = metrics, settings, provenance
        self._keys = [key.encode() for key in settings.keys]
        self._bodies = Limiter("bytes of request bodies", settings.max_bodies_bytes)

    def __call__(self, handler: Handler, *, public: bool = False) -> Handler:
        """Add authentication, error handling, metrics and logging to a handler.

        Args:
            handler: the handler of a route.
            public: True to skip authentication.
        """

        async def handle(request: Request) -> Response:
            request_id = safe_name(request.headers.get("x-request-id", "")[:80])
            request_id = uuid.uuid4().hex if request_id == "unnamed" else request_id
            start = time.monotonic()
            try:
                if not public:
                    self._require_key(request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:  # the client always gets an error response in the documented format
                problem = problem_of(error)
                if problem.status == 500:
                    logger.exception("request %s failed", request_id)
                response = self.json(problem.body(), problem.status, problem.headers)
            seconds, path, status = time.monotonic() - start, request.url.path, response.status_code
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(seconds)
            logger.info("%s %s %s %d %.3f s", request_id, request.method, path, status, seconds)
            response.headers["X-Request-Id"] = request_id
            return response

        return handle

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[Any]:
        """Read and decode the JSON body of a request, up to the size limit.

        The size of the body counts towards the limit for all bodies until the block ends.

        Raises:
            Problem: 400, 408, 413 or 415.
            Overloaded: the bodies of all requests would exceed their limit.
        """
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, "unsupported_media_type", f"The request body is {kind:.80}, expected application/json.")
        reserved = 0  # one number: a client may send a body in very many chunks
        content = bytearray()
        try:
            try:
                async with asyncio.timeout(self._settings.body_timeout_s):
                    self._check_size(int(request.headers.get("content-length", 0)))
                    async for chunk in request.stream():
                        self._check_size(len(content) + len(chunk))
                        self._bodies.acquire(len(chunk))
                        reserved += len(chunk)
                        content += chunk
            except TimeoutError:
                message = f"The request body was not received in {self._settings.body_timeout_s:g} s."
                raise Problem(408, "slow_body", message, headers=CLOSE) from None
            try:
                decoded = orjson.loads(content)
            except orjson.JSONDecodeError as error:
                raise Problem(400, "invalid_json", f"The request body is not valid JSON: {error}") from None
            del content
            yield decoded
        finally:
            self._bodies.release(reserved)

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        """A JSON response; `value` may contain NumPy arrays."""
        content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
        sent = {"X-Jinaclip-Provenance": self._provenance, **(headers or {})}
        return Response(content, status_code=status, headers=sent, media_type="application/json")

    async def no_route(self, request: Request, error: Exception) -> Response:
        """The response to a request with an unknown path or method."""
        assert isinstance(error, HTTPException)
        what = {404: "This path does not exist", 405: f"Method {request.method} is not allowed here"}
        message = f"{what.get(error.status_code, error.detail)}; see /docs."
        problem = Problem(error.status_code, "no_such_route", message, headers=dict(error.headers or {}))
        return self.json(problem.body(), problem.status, problem.headers)

    def _check_size(self, size: int) -> None:
        if size > self._settings.max_body_bytes:
            message = f"The request body exceeds {self._settings.max_body_bytes} bytes; send fewer items at once."
            raise Problem(413, "body_too_large", message, headers=CLOSE)

    def _require_key(self, request: Request) -> None:
        """Check the API key. It is compared with all keys, each in constant time.

        Raises:
            Problem: 401, the key is missing or wrong.
        """
        if not self._keys:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            message = "An API key is required; send the header Authorization: Bearer KEY."
            raise Problem(401, "missing_key", message, headers=KEY_REQUIRED)
        given = token.strip().encode("utf-8", "replace")
        if not max([hmac.compare_digest(given, key) for key in self._keys]):
            raise Problem(401, "wrong_key", "The API key is not valid.", headers=KEY_REQUIRED)
