"""The routes. jinaclip.server.service computes the embeddings; jinaclip.server.middleware has what all routes share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from jinaclip.server.apis.answers import embedding_data, rank_data
from jinaclip.server.apis.marketplaces import Marketplace
from jinaclip.server.apis.requests import Rules, embedding_request, rank_request
from jinaclip.server.errors import Problem
from jinaclip.server.metrics import Metrics
from jinaclip.server.middleware import Handling
from jinaclip.server.openapi import description, page
from jinaclip.server.service import Embedded, Service, cancelled_with


@dataclass(frozen=True)
class Settings:
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


class Server:
    """The HTTP application of a service.

    Attributes:
        app: the ASGI application.
        draining: True during the shutdown; new requests get 503.
        in_flight: the number of embedding and rank requests that are not answered yet.
    """

    def __init__(self, service: Service, rules: Rules, metrics: Metrics, settings: Settings) -> None:
        self.service, self.rules, self.draining, self.in_flight = service, rules, False, 0
        self._metrics = metrics
        self._handling = handled = Handling(
            metrics, keys=settings.keys, provenance=service.model.provenance, max_body_bytes=settings.max_body_bytes,
            max_bodies_bytes=settings.max_bodies_bytes, body_timeout_s=settings.body_timeout_s,
        )  # fmt: skip
        self._description = description(rules, service.max_tokens, keyed=bool(settings.keys))
        self._page = page(self._description)
        routes = [
            Route("/health", handled(self._health, open_to_all=True), methods=["GET"]),
            Route("/ready", handled(self._ready, open_to_all=True), methods=["GET"]),
        ]
        if settings.marketplace is None or settings.keys:
            routes += [
                Route("/v1/embeddings", handled(self._embeddings), methods=["POST"]),
                Route("/v1/rank", handled(self._rank), methods=["POST"]),
                Route("/v1/models", handled(self._models), methods=["GET"]),
                Route("/metrics", handled(self._exposed), methods=["GET"]),
                Route("/openapi.json", handled(self._openapi), methods=["GET"]),
                Route("/docs", handled(self._docs), methods=["GET"]),
            ]
        if (market := settings.marketplace) is not None:  # the platform authenticates callers
            predict = partial(self._predict, market)
            routes = [
                Route(market.health, handled(self._health, open_to_all=True), methods=["GET"]),
                Route(market.predict, handled(predict, open_to_all=True), methods=["POST"]),
                *routes,
            ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: handled.no_route})

    async def _embeddings(self, request: Request) -> Response:
        async with self._working(request) as body:
            answer, warning = await self._embedded(body)
            return self._answered(answer, warning)

    async def _predict(self, market: Marketplace, request: Request) -> Response:
        async with self._working(request) as body:
            answer, warning = await self._embedded(*market.request(body))
            return self._answered(market.answer(answer), warning)

    async def _rank(self, request: Request) -> Response:
        async with self._working(request) as body:
            wanted = rank_request(body, self.rules)
            fields = (("texts", wanted.texts), ("images", wanted.images))
            texts, images = await self.service.embed(*fields, task=wanted.task, truncate=bool(wanted.truncate))
            data = rank_data(wanted, texts, images, self.service.model.logit_scale)
            return self._answered(self._list(data, [*texts, *images]), wanted.warning)

    async def _embedded(self, body: Any, field: str = "input") -> tuple[dict[str, Any], str | None]:
        """Answer a body of POST /v1/embeddings.

        Args:
            body: the decoded JSON body.
            field: the client's name of the field `input`, for messages.

        Returns:
            The response body and a warning, or None.
        """
        wanted = embedding_request(body, self.rules, field)
        (found,) = await self.service.embed(
            (field, wanted.input), task=wanted.task, truncate=bool(wanted.truncate), partial=bool(wanted.partial)
        )
        return self._list(embedding_data(wanted, found), found), wanted.warning

    def _list(self, data: list[dict[str, Any]], items: Sequence[Embedded | Problem]) -> dict[str, Any]:
        tokens = sum(item.tokens for item in items if isinstance(item, Embedded))
        usage = {"total_tokens": tokens, "prompt_tokens": tokens}
        return {"model": self.rules.model_names[0], "object": "list", "usage": usage, "data": data}

    def _answered(self, answer: dict[str, Any], warning: str | None) -> Response:
        return self._handling.json(answer, headers={"X-Jinaclip-Warning": warning} if warning else None)

    @asynccontextmanager
    async def _working(self, request: Request) -> AsyncIterator[Any]:
        """Read the body of an embedding or rank request and count the request as in flight during the block.

        The block is cancelled if the client disconnects. A shutdown waits for it.
        """
        if self.draining:
            raise Problem(503, "shutting_down", "This server is shutting down; send the request to another server.",
                          headers={"Retry-After": "1", "Connection": "close"})  # fmt: skip
        self.in_flight += 1
        try:
            async with self._handling.body(request) as body, cancelled_with(partial(_client_left, request)):
                yield body
        finally:
            self.in_flight -= 1

    async def _models(self, request: Request) -> Response:
        model, rules = self.service.model, self.rules
        facts = {
            "id": rules.model_names[0],
            "object": "model",
            "created": 0,
            "owned_by": "jinaclip",
            "aliases": list(rules.model_names[1:]),
            "licence": model.bundle.model.get("licence"),
            "provenance": model.provenance,
            "dimensions": list(rules.dims),
            "max_tokens": self.service.max_tokens,
            "tasks": list(rules.tasks),
            "towers": list(self.service.batchers),
        }
        return self._handling.json({"object": "list", "data": [facts]})

    async def _health(self, request: Request) -> Response:
        working, towers = await asyncio.to_thread(self.service.health)
        status = "failing" if not working else "draining" if self.draining else "ok"
        return self._handling.json({"status": status, "towers": towers}, 200 if working else 503)

    async def _ready(self, request: Request) -> Response:
        if self.draining:
            raise Problem(503, "shutting_down", "This server is shutting down.")
        return self._handling.json({"status": "ok"})

    async def _exposed(self, request: Request) -> Response:
        return Response(self._metrics.exposed(), media_type=CONTENT_TYPE_LATEST)

    async def _openapi(self, request: Request) -> Response:
        return self._handling.json(self._description)

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(self._page)


async def _client_left(request: Request) -> None:
    """Returns when the client closes its connection. The body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
