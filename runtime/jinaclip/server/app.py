"""The HTTP side: routes, keys, limits, errors. What it answers is made by jinaclip.server.service."""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from jinaclip.bundle import safe_name
from jinaclip.matryoshka import truncate
from jinaclip.server.answers import embedding_of
from jinaclip.server.problems import Problem, problem_of
from jinaclip.server.requests import EmbeddingRequest, Limits, parse_request
from jinaclip.server.service import Prepared, Service, cancelled_with

logger = logging.getLogger("jinaclip.server")

OPEN_ROUTES = ("/health", "/ready")  # answered without a key: they tell nothing but whether the server lives


@dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes:
        model_names: that a request may call the model; the first is what answers say.
        keys: one of them must come as a bearer token; () lets everyone in.
        max_body_bytes: of a request.
        limits: of what a request asks for.
    """

    model_names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    max_body_bytes: int = 64 << 20
    limits: Limits = field(default_factory=Limits)


class Server:
    """The application over a service.

    Attributes:
        app: for an ASGI server.
        draining: new requests are answered with 503.
        in_flight: requests for vectors that are not answered yet.
    """

    def __init__(self, service: Service, settings: Settings) -> None:
        self.service, self.settings, self.draining = service, settings, False
        self.in_flight = 0
        self._provenance = service.model.provenance
        self._registry = CollectorRegistry()
        self._metrics = _Metrics(self._registry, service)
        routes = [
            Route("/v1/embeddings", self._handled(self._embeddings), methods=["POST"]),
            Route("/v1/models", self._handled(self._models), methods=["GET"]),
            Route("/health", self._handled(self._health), methods=["GET"]),
            Route("/ready", self._handled(self._ready), methods=["GET"]),
            Route("/metrics", self._handled(self._exposed), methods=["GET"]),
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self._no_route})

    async def _embeddings(self, request: Request) -> Response:
        if self.draining:
            raise Problem(503, "shutting_down", "this server is about to end; send the request to another",
                          headers={"Retry-After": "1", "Connection": "close"})  # fmt: skip
        self.in_flight += 1
        try:
            return await self._vectors(request)
        finally:
            self.in_flight -= 1

    async def _vectors(self, request: Request) -> Response:
        bundle = self.service.model.bundle
        body = await self._body(request)
        asked = parse_request(body, dims=bundle.dims, tasks=tuple(bundle.tasks), limits=self.settings.limits)
        if asked.model is not None and asked.model not in self.settings.model_names:
            names = ", ".join(self.settings.model_names)
            raise Problem(404, "model_not_found", f"model {asked.model!r:.80} is not served here; expected {names}",
                          param="model")  # fmt: skip
        async with cancelled_with(partial(_client_left, request)):
            items = await self.service.prepare(asked)
            good = [item for item in items if isinstance(item, Prepared)]
            problems = [item for item in items if isinstance(item, Problem)]
            if problems and (not asked.partial or not good):
                raise problems[0]
            vectors = await self.service.vectors(good)
        return self._json(self._answer(asked, items, vectors))

    def _answer(
        self, asked: EmbeddingRequest, items: Sequence[Prepared | Problem], vectors: Sequence[np.ndarray]
    ) -> dict[str, Any]:
        dim = asked.dimensions or max(self.service.model.dims)
        answered = [index for index, item in enumerate(items) if isinstance(item, Prepared)]
        for index, vector in zip(answered, vectors, strict=True):
            if not np.isfinite(vector).all():  # JSON would say null, and an index would store it
                raise Problem(500, "not_finite", f"input[{index}] came out as NaN or infinity", index=index)
        finished = iter(truncate(np.stack(vectors), dim, normalize=asked.normalized))
        data: list[dict[str, Any]] = []
        for index, item in enumerate(items):
            if isinstance(item, Problem):
                data.append({"object": "error", "index": index, "error": item.error()})
            else:
                value = embedding_of(next(finished), asked.types, single=asked.single_type)
                data.append({"object": "embedding", "index": index, "embedding": value})
        tokens = sum(item.tokens for item in items if isinstance(item, Prepared))
        for item in items:
            if isinstance(item, Prepared):
                self._metrics.items.labels(item.tower).inc()
        return {
            "model": self.settings.model_names[0],
            "object": "list",
            "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
            "data": data,
        }

    async def _models(self, request: Request) -> Response:
        model = self.service.model
        facts = {
            "id": self.settings.model_names[0],
            "object": "model",
            "created": 0,
            "owned_by": "jinaclip",
            "aliases": list(self.settings.model_names[1:]),
            "licence": model.bundle.model.get("licence"),
            "provenance": self._provenance,
            "dimensions": list(model.dims),
            "max_tokens": self.service.max_tokens,
            "tasks": list(model.tasks),
            "towers": list(model.info()["towers"]),
        }
        return self._json({"object": "list", "data": [facts]})

    async def _health(self, request: Request) -> Response:
        towers = {
            tower: {name: facts[name] for name in ("backend", "device", "precision", "self_test")}
            for tower, facts in self.service.model.info()["towers"].items()
        }
        return self._json({"status": "draining" if self.draining else "ok", "towers": towers})

    async def _ready(self, request: Request) -> Response:
        if self.draining:
            raise Problem(503, "shutting_down", "this server is about to end")
        return self._json({"status": "ok"})

    async def _exposed(self, request: Request) -> Response:
        self._metrics.refresh()
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _body(self, request: Request) -> Any:
        """The decoded JSON of a request, read no further than the limit."""
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, "unsupported_media_type", f"the body is {kind:.80}, expected application/json")
        limit = self.settings.max_body_bytes
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                raise Problem(413, "body_too_large", f"the body has more than {limit} bytes; send fewer items at once")
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise Problem(400, "invalid_json", f"the body is no JSON: {error}") from None

    def _handled(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A handler with what all have: key, request id, times, errors in our form. No input is ever logged."""

        async def handle(request: Request) -> Response:
            request_id = safe_name(request.headers.get("x-request-id", "")[:80])
            request_id = uuid.uuid4().hex if request_id == "unnamed" else request_id
            start = time.monotonic()
            try:
                self._require_key(request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:  # whatever it is, the client gets an answer in our form
                problem = problem_of(error)
                if problem.status == 500:
                    logger.exception("request %s failed", request_id)
                response = self._json(problem.body(), problem.status, problem.headers)
            seconds = time.monotonic() - start
            self._metrics.requests.labels(request.url.path, response.status_code).inc()
            self._metrics.seconds.labels(request.url.path).observe(seconds)
            logger.info(
                "%s %s %s %d %.3f s", request_id, request.method, request.url.path, response.status_code, seconds
            )
            response.headers["X-Request-Id"] = request_id
            return response

        return handle

    def _require_key(self, request: Request) -> None:
        """Raises Problem: no key, or another one. All are compared, in constant time."""
        if not self.settings.keys or request.url.path in OPEN_ROUTES:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Problem(401, "missing_key", "this server asks for a key; send Authorization: Bearer KEY",
                          headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        given = token.strip().encode("utf-8", "replace")
        if not max([hmac.compare_digest(given, key.encode()) for key in self.settings.keys]):
            raise Problem(401, "wrong_key", "this key is none of this server's",
                          headers={"WWW-Authenticate": "Bearer"})  # fmt: skip

    async def _no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: "there is nothing at this path", 405: f"{request.method} is not what this path takes"}
        words = what.get(error.status_code, str(error.detail))
        problem = Problem(error.status_code, "no_such_route", f"{words}; the API is POST /v1/embeddings",
                          headers=dict(error.headers or {}))  # fmt: skip
        return self._json(problem.body(), problem.status, problem.headers)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
        sent = {"X-Jinaclip-Provenance": self._provenance, **(headers or {})}
        return Response(content, status_code=status, headers=sent, media_type="application/json")


class _Metrics:
    """What Prometheus is told."""

    def __init__(self, registry: CollectorRegistry, service: Service) -> None:
        self._service = service
        self.requests = Counter("jinaclip_requests", "requests answered", ("path", "status"), registry=registry)
        self.seconds = Histogram("jinaclip_request_seconds", "time to an answer", ("path",), registry=registry)
        self.items = Counter("jinaclip_items", "texts and images answered", ("tower",), registry=registry)
        self._waiting = Gauge("jinaclip_queue_items", "items that wait", ("tower",), registry=registry)
        self._oldest = Gauge("jinaclip_queue_oldest_seconds", "how long the first has waited", ("tower",),
                             registry=registry)  # fmt: skip
        self._left = Gauge("jinaclip_dropped_items", "items whose clients left", ("tower",), registry=registry)
        self._refused = Gauge("jinaclip_refused_items", "items that found no room", ("tower",), registry=registry)
        self._batches = Gauge("jinaclip_batches", "runs by their number of items", ("tower", "size"), registry=registry)

    def refresh(self) -> None:
        for batcher in (self._service.texts, self._service.images):
            if batcher is not None:
                self._waiting.labels(batcher.name).set(batcher.waiting())
                self._oldest.labels(batcher.name).set(batcher.oldest())
                self._left.labels(batcher.name).set(batcher.counts.left)
                self._refused.labels(batcher.name).set(batcher.counts.refused)
                for size, count in list(batcher.counts.batches.items()):
                    self._batches.labels(batcher.name, size).set(count)


async def _client_left(request: Request) -> None:
    """Returns when the client closes its connection. The body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
