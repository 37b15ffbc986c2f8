"""The embedding service: a model behind one queue per tower. Items are prepared in threads while batches run."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect

from jinaclip.errors import JinaClipError
from jinaclip.model import ClipModel
from jinaclip.server.admission import Room
from jinaclip.server.apis.items import Address, Encoded, Item, Text, Tokens
from jinaclip.server.errors import Problem, invalid
from jinaclip.server.fetch import Fetcher
from jinaclip.server.metrics import Metrics
from jinaclip.server.preparation import Limits, Preparation, Prepared
from jinaclip.server.queue import Batcher, choose_images, choose_texts

TESTED_AGAIN_S = 10.0  # the shortest time between two self-tests of a tower whose runs fail


@dataclass(frozen=True)
class Embedded:
    """The embedding of an item.

    Attributes:
        vector: the unnormalized embedding, float32 [D].
        tokens: the number of tokens counted for usage.
    """

    vector: np.ndarray
    tokens: int


class Service:
    """Computes the embeddings of requests with one model. Use it from one event loop.

    Args:
        model: the open model. The caller closes it.
        limits: limits on requests and queues; None for the defaults.
        metrics: the counters to update; None for unexported ones.
        fetcher: downloads images from URLs; None to reject URLs.
        narrow: the same model opened with fewer threads, used for batches that run at the same time under load; None
            to run batches one after the other.
        workers: the number of batches of `narrow` that run at the same time.

    Attributes:
        max_tokens: the most tokens in a text.
        batchers: the queue of each tower.
        rooms: the admission limit of each tower, in items that are accepted and not answered yet.
    """

    def __init__(
        self, model: ClipModel, *, limits: Limits | None = None, metrics: Metrics | None = None,
        fetcher: Fetcher | None = None, narrow: ClipModel | None = None, workers: int = 1,
    ) -> None:  # fmt: skip
        self.model, self._narrow = model, narrow
        self._long = threading.Lock()  # one long text at a time: it uses much memory and all cores
        self._limits, self._metrics = limits or Limits(), metrics or Metrics()
        self.max_tokens = min(self._limits.tokens or model.max_tokens, model.max_tokens)
        self.batchers: dict[str, Batcher[Any]] = {}
        self.rooms: dict[str, Room] = {}
        self._self_test = {tower: facts["self_test"] for tower, facts in model.info()["towers"].items()}
        self._tested = dict.fromkeys(self._self_test, time.time())
        self._broken: dict[str, str] = {}
        run: dict[str, Callable[[Sequence[Any], bool], np.ndarray]] = {
            "text": self._run_texts,
            "image": self._run_images,
        }
        for tower, room in (("text", self._limits.queue_texts), ("image", self._limits.queue_images)):
            if tower not in self._self_test:
                continue
            session = model.encoders[tower].session
            cost = session.cost
            # The work is divided among the workers, but a batch stays large enough that its fixed cost is at most 1/8.
            share = replace(cost, tokens=max(cost.tokens // workers, 8 * cost.opening_tokens))
            choose: Any = (
                partial(choose_texts, tower=model.bundle.tower("text"), cost=share)
                if tower == "text" else partial(choose_images, cost=cost)
            )  # fmt: skip
            self.rooms[tower] = Room(f"{tower}s", room)
            self.batchers[tower] = Batcher(
                tower, run[tower], choose, workers=max(workers, session.concurrency),
                gather_s=self._limits.gather_s, observe=partial(self._ran, tower),
            )  # fmt: skip
        self._metrics.watch(self.batchers, self.rooms)
        self._preparation = Preparation(model, self.max_tokens, self._limits, self._metrics, fetcher)

    async def embed(
        self, *fields: tuple[str, Sequence[Item | Problem]], task: str | None, truncate: bool, partial: bool = False
    ) -> list[list[Embedded | Problem]]:
        """Compute the embeddings of a request's items.

        Args:
            fields: the name and the items of each request field.
            task: a task of the bundle, or None.
            truncate: True to truncate texts that are too long.
            partial: True to return a Problem in place of each invalid item, unless all items are invalid.

        Returns:
            For each field, its results in the order of the items.

        Raises:
            Overloaded: the queue limit would be exceeded.
            Problem: an item is invalid; the message contains its field and index.
        """
        with self.accepted([item for _, items in fields for item in items]):
            names = [name for name, _ in fields]
            prepare = [self._preparation.prepare(items, name, task=task, truncate=truncate) for name, items in fields]
            prepared = await asyncio.gather(*prepare)
            places = [(name, i, row[i]) for name, row in zip(names, prepared, strict=True) for i in range(len(row))]
            good = [(name, index, item) for name, index, item in places if isinstance(item, Prepared)]
            first = next((item for _, _, item in places if isinstance(item, Problem)), None)
            if first is not None and not (partial and good):
                raise first
            vectors = await self.vectors([item for _, _, item in good])
        for (name, index, item), vector in zip(good, vectors, strict=True):
            if not np.isfinite(vector).all():  # JSON would contain null, which some clients store
                raise Problem(500, "not_finite", "has an embedding with NaN or infinite values").at(name, index)
            self._metrics.items.labels(item.tower).inc()
        ready = iter(vectors)
        return [
            [Embedded(next(ready), item.tokens) if isinstance(item, Prepared) else item for item in row]
            for row in prepared
        ]

    @contextmanager
    def accepted(self, items: Sequence[Item | Problem]) -> Iterator[None]:
        """Reserve queue capacity for a request's items during the block, before any of them is fetched or decoded.

        Raises:
            Overloaded: the capacity is in use; retry later.
            Problem: the request has more items than the total capacity.
        """
        texts = sum(isinstance(item, Text | Tokens) for item in items)
        images = sum(isinstance(item, Encoded | Address) for item in items)
        with ExitStack() as stack:
            for tower, count in (("text", texts), ("image", images)):
                room = self.rooms.get(tower)
                if room is None or not count:
                    continue
                if count > room.limit:
                    raise invalid("input", f"{count} {room.what} exceed this server's limit of {room.limit}; send "
                                           "fewer per request", code="too_many_items")  # fmt: skip
                stack.enter_context(room.taken(count))
            yield

    async def vectors(self, items: Sequence[Prepared]) -> list[np.ndarray]:
        """Unnormalized embeddings, float32 [D], in order. If the caller is cancelled, its queued items are dropped."""
        futures: list[Future[np.ndarray]] = []
        try:
            by_tower = {}
            for tower, batcher in self.batchers.items():
                added = batcher.submit([item.value for item in items if item.tower == tower])
                futures += added
                by_tower[tower] = iter(added)
            ordered = [next(by_tower[item.tower]) for item in items]
            return list(await asyncio.gather(*(asyncio.wrap_future(future) for future in ordered)))
        finally:
            for future in futures:
                future.cancel()  # no effect if the item runs or is done

    def health(self) -> tuple[bool, dict[str, dict[str, Any]]]:
        """The state of every tower. Blocks for a self-test if the last run of a tower failed.

        A run can fail because of its input, because memory is short or because the device is lost. The self-test
        shows whether the tower still works.

        Returns:
            True if every tower works, and for each tower its status, backend and last self-test.
        """
        info = self.model.info()["towers"]
        towers = {}
        for tower, batcher in self.batchers.items():
            if (batcher.counts.failing or tower in self._broken) and time.time() - self._tested[tower] > TESTED_AGAIN_S:
                self._test(tower)
            names = ("backend", "device", "providers", "precision")
            towers[tower] = {
                "status": "failing" if tower in self._broken else "ok",
                **{name: info[tower][name] for name in names if name in info[tower]},
                "self_test": {**self._self_test[tower], "age_seconds": round(time.time() - self._tested[tower], 1)},
            }
            if tower in self._broken:
                towers[tower]["error"] = self._broken[tower]
        return not self._broken, towers

    def close(self, grace_s: float) -> int:
        """Finish accepted items and stop.

        Args:
            grace_s: the longest time to wait, in seconds.

        Returns:
            The number of items that were not finished in time.
        """
        deadline = time.monotonic() + grace_s
        left = sum(batcher.close(max(0.0, deadline - time.monotonic())) for batcher in self.batchers.values())
        self._preparation.close()
        return left

    def _test(self, tower: str) -> None:
        self._tested[tower] = time.time()
        try:
            self._self_test[tower] = self.model.encoders[tower].check()
            if self._narrow is not None:
                self._narrow.encoders[tower].check()
            self._broken.pop(tower, None)
            self.batchers[tower].counts.failing = 0
        except JinaClipError as error:
            self._broken[tower] = str(error)

    def _run_texts(self, rows: Sequence[list[int]], alone: bool) -> np.ndarray:
        if len(rows[0]) > self.model.text_encoder.session.cost.tokens:  # such a text is a batch of its own
            with self._long:
                return self.model.text_encoder.run(rows)
        return self._for(alone).text_encoder.run(rows)

    def _run_images(self, pixels: Sequence[np.ndarray], alone: bool) -> np.ndarray:
        return self._for(alone).image_encoder.run(pixels)

    def _for(self, alone: bool) -> ClipModel:
        """The model instance that runs a batch."""
        return self.model if alone or self._narrow is None else self._narrow

    def _ran(self, tower: str, waited: Sequence[float], seconds: float) -> None:
        for wait in waited:
            self._metrics.stages.labels(tower, "wait").observe(wait)
        self._metrics.stages.labels(tower, "run").observe(seconds)


@contextlib.asynccontextmanager
async def cancelled_with(client_left: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Cancel the block when the client disconnects.

    Args:
        client_left: a function that returns when the client has disconnected.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    task, left = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal left
        await client_left()
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not left:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        watcher.cancel()
