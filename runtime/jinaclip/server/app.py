"""The routes. jinaclip.server.service computes the embeddings; jinaclip.server.middleware has what all routes share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from jinaclip.server.apis.answers import answer, embedding_data, rank_data
from jinaclip.server.apis.items import Item
from jinaclip.server.apis.marketplaces import Marketplace
from jinaclip.server.apis.requests import Request as AnyRequest
from jinaclip.server.apis.requests import Rules, embedding_request, rank_request
from jinaclip.server.errors import Problem
from jinaclip.server.middleware import Handling, ServerSettings
from jinaclip.server.openapi import description, page
from jinaclip.server.queue import QueueClosed
from jinaclip.server.service import Service


class Server:
    """The HTTP application of a service.

    Attributes:
        app: the ASGI application.
        draining: True during the shutdown; new requests get 503.
        in_flight: the number of embedding and rank requests that are not answered yet.
    """

    def __init__(self, service: Service, rules: Rules, settings: ServerSettings) -> None:
        self.service, self.rules, self.draining, self.in_flight = service, rules, False, 0
        self._description = description(rules, service.max_tokens, keyed=bool(settings.keys))
        self._handling = handled = Handling(service.metrics, settings, service.model.provenance)
        public = partial(handled, public=True)
        routes = [Route("/health", public(self._health)), Route("/ready", public(self._ready))]
        if settings.marketplace is None or settings.keys:
            routes += [
                Route("/v1/embeddings", handled(self._embeddings), methods=["POST"]),
                Route("/v1/rank", handled(self._rank), methods=["POST"]),
                Route("/v1/models", handled(self._models)),
                Route("/metrics", handled(self._exposed)),
                Route("/openapi.json", handled(self._openapi)),
                Route("/docs", handled(self._docs)),
            ]
        if (market := settings.marketplace) is not None:  # the platform authenticates callers
            routes.insert(0, Route(market.health, public(self._health)))
            routes.insert(0, Route(market.predict, public(partial(self._embeddings, market=market)), methods=["POST"]))
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: handled.no_route})

    async def _embeddings(self, request: Request, market: Marketplace | None = None) -> Response:
        async with self._working(request) as body:
            body, field = market.request(body) if market else (body, "input")
            wanted = embedding_request(body, self.rules, field)
            await self._embed(wanted, wanted.input, partial=bool(wanted.partial))
            found = answer(self.rules.model_names[0], wanted.input, embedding_data(wanted))
            return self._handling.json(market.answer(found) if market else found, headers=wanted.headers)

    async def _rank(self, request: Request) -> Response:
        async with self._working(request) as body:
            wanted = rank_request(body, self.rules)
            items = [*wanted.texts, *wanted.images]
            await self._embed(wanted, items)
            found = answer(self.rules.model_names[0], items, rank_data(wanted, self.service.model.logit_scale))
            return self._handling.json(found, headers=wanted.headers)

    async def _embed(self, wanted: AnyRequest, items: list[Item], *, partial: bool = False) -> None:
        await self.service.embed(items, task=wanted.task, truncate=bool(wanted.truncate), partial=partial)

    @asynccontextmanager
    async def _working(self, request: Request) -> AsyncIterator[Any]:
        """Read the body of an embedding or rank request and count the request as in flight during the block.

        The block is cancelled if the client disconnects. A shutdown waits for it until the grace period ends.

        Raises:
            Problem: 503, the server is shutting down; or the body cannot be used.
        """
        message = "This server is shutting down; send the request to another server."
        closed = Problem(503, "shutting_down", message, headers={"Retry-After": "1", "Connection": "close"})
        if self.draining:
            raise closed
        self.in_flight += 1
        try:
            async with self._handling.body(request) as body, _cancelled_if_client_leaves(request):
                yield body
        except QueueClosed:
            raise closed from None
        except asyncio.CancelledError:
            if not self.draining:
                raise
            raise closed from None  # the grace period is over
        finally:
            self.in_flight -= 1

    async def _models(self, request: Request) -> Response:
        model = self.service.model
        name, *aliases = self.rules.model_names
        entry = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "jinaclip",
            "aliases": aliases,
            "licence": model.bundle.model.get("licence"),
            "provenance": model.provenance,
            "dimensions": self.rules.dims,
            "max_tokens": self.service.max_tokens,
            "tasks": self.rules.tasks,
            "towers": list(self.service.batchers),
        }
        return self._handling.json({"object": "list", "data": [entry]})

    async def _health(self, request: Request) -> Response:
        working, towers = await asyncio.to_thread(self.service.health)
        status = "failing" if not working else "draining" if self.draining else "ok"
        return self._handling.json({"status": status, "towers": towers}, 200 if working else 503)

    async def _ready(self, request: Request) -> Response:
        if self.draining:
            raise Problem(503, "shutting_down", "This server is shutting down.")
        return self._handling.json({"status": "ok"})

    async def _exposed(self, request: Request) -> Response:
        return Response(generate_latest(self.service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _openapi(self, request: Request) -> Response:
        return self._handling.json(self._description)

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(page(self._description))


@asynccontextmanager
async def _cancelled_if_client_leaves(request: Request) -> AsyncIterator[None]:
    """Cancel the block if the client closes its connection. The request's body has been read.

    Raises:
        ClientDisconnect: the client closed its connection.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(_client_left(request))
            yield
            watcher.cancel()
    except BaseExceptionGroup as errors:  # a group with the only error of the block or of the watcher
        raise errors.exceptions[0] from None


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect
