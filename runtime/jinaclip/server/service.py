"""The embedding service: a model behind one queue per tower. Items are prepared in threads while batches run."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from jinaclip.errors import JinaClipError
from jinaclip.model import ClipModel
from jinaclip.server.admission import Limiter
from jinaclip.server.apis.items import Item, valid_items
from jinaclip.server.errors import Problem, invalid
from jinaclip.server.fetch import Fetcher
from jinaclip.server.metrics import Metrics
from jinaclip.server.preparation import Limits, Preparation
from jinaclip.server.queue import Batcher, choose_images, choose_texts

TESTED_AGAIN_S = 10.0  # the shortest time between two self-tests of a tower whose runs fail


class Service:
    """Computes the embeddings of requests with one model. Use it from one event loop.

    Args:
        model: the open model. The caller closes it.
        limits: limits on requests and queues; None for the defaults.
        fetcher: downloads images from URLs; None to reject URLs.
        parallel_model: the same model opened with fewer threads, used for batches that run at the same time under
            load; None to run batches one after the other.
        workers: the number of batches of `parallel_model` that run at the same time.

    Attributes:
        max_tokens: the most tokens in a text.
        batchers: the queue of each tower.
        limiters: the admission limit of each tower, in items that are accepted and not answered yet.
        metrics: the counters that the service and the server update.
    """

    def __init__(
        self, model: ClipModel, limits: Limits | None = None, *,
        fetcher: Fetcher | None = None, parallel_model: ClipModel | None = None, workers: int = 1,
    ) -> None:  # fmt: skip
        self.model, self._parallel_model, self._workers = model, parallel_model or model, workers
        self._long_text = threading.Lock()  # one long text at a time: it uses much memory and all cores
        self._limits = limits or Limits()
        self.max_tokens = min(self._limits.tokens or model.max_tokens, model.max_tokens)
        self.batchers: dict[str, Batcher[Any]] = {}
        self.limiters: dict[str, Limiter] = {}
        self.metrics = Metrics(self.batchers, self.limiters)
        self._tested_at = dict.fromkeys(model.encoders, time.time())  # the last self-test of each tower
        self._failures: dict[str, str] = {}  # of the towers that did not pass it
        if "text" in model.encoders:
            cost = model.text_encoder.session.cost
            # The work is divided among the workers, but a batch stays large enough that its fixed cost is at most 1/8.
            share = replace(cost, tokens=max(cost.tokens // workers, 8 * cost.opening_tokens))
            choose = functools.partial(choose_texts, tower=model.bundle.tower("text"), cost=share)
            self._open_queue("text", choose, self._limits.queue_texts)
        if "image" in model.encoders:
            choose = functools.partial(choose_images, cost=model.image_encoder.session.cost)
            self._open_queue("image", choose, self._limits.queue_images)
        self._preparation = Preparation(model, self.max_tokens, self._limits, self.metrics, fetcher)

    def _open_queue(self, tower: str, choose: Callable[..., Sequence[int]], limit: int) -> None:
        workers = max(self._workers, self.model.encoders[tower].session.concurrency)
        run, observe = functools.partial(self._run_batch, tower), functools.partial(self._observe, tower)
        self.limiters[tower] = Limiter(f"{tower}s", limit)
        self.batchers[tower] = Batcher(
            tower, run, choose, workers=workers, gather_s=self._limits.gather_s, observe=observe
        )

    async def embed(self, items: Sequence[Item], *, task: str | None, truncate: bool, partial: bool = False) -> None:
        """Compute the embeddings of a request's items. Sets the vector and the tokens of each item.

        Args:
            items: the items, from all fields of the request.
            task: a task of the bundle, or None.
            truncate: True to truncate texts that are too long.
            partial: True to set the problem of each invalid item instead of raising it, unless all items are invalid.

        Raises:
            Overloaded: the queue limit would be exceeded; retry later.
            Problem: an item is invalid; the message contains its field and index. Or the request has more items than
                the queue limit.
        """
        for item in items:
            if item.problem is None and item.tower not in self.batchers:
                kind = {"text": "a text", "image": "an image"}[item.tower]
                what = f"is {kind}, but this server has no {item.tower} tower"
                item.fail(invalid("input", what, code=f"no_{item.tower}_tower"))
        valid = valid_items(items, partial=partial)
        with ExitStack() as reserved:  # capacity of the queues, before any of the items is fetched or decoded
            for tower, limiter in self.limiters.items():
                count = sum(item.tower == tower for item in valid)
                if count > limiter.limit:
                    what = f"{count} {limiter.resource} exceed this server's limit of {limiter.limit}"
                    raise invalid("input", f"{what}; send fewer per request", code="too_many_items")
                reserved.enter_context(limiter.reserved(count))
            await self._preparation.prepare(valid, task=task, truncate=truncate)
            valid = valid_items(items, partial=partial)
            await self._run(valid)
        for item in valid:
            if not np.isfinite(item.vector).all():  # JSON would contain null, which some clients store
                what = "has an embedding with NaN or infinite values"
                raise Problem(500, "not_finite", what).at(item.field, item.index)
            self.metrics.items.labels(item.tower).inc()

    async def _run(self, items: Sequence[Item]) -> None:
        """Run prepared items in batches. If the caller is cancelled, its queued items are dropped."""
        futures: list[tuple[Item, Future[np.ndarray]]] = []
        try:
            for tower, batcher in self.batchers.items():
                queued = [item for item in items if item.tower == tower]
                futures += zip(queued, batcher.submit([item.model_input for item in queued]), strict=True)
            vectors = await asyncio.gather(*(asyncio.wrap_future(future) for _, future in futures))
            for (item, _), vector in zip(futures, vectors, strict=True):
                item.vector = vector
        finally:
            for _, future in futures:
                future.cancel()  # no effect if the item runs or is done

    def health(self) -> tuple[bool, dict[str, dict[str, Any]]]:
        """The state of every tower. Blocks for a self-test if the last run of a tower failed.

        A run can fail because of its input, because memory is short or because the device is lost. The self-test
        shows whether the tower still works.

        Returns:
            True if every tower works, and for each tower its status, backend and last self-test.
        """
        for tower, tested_at in self._tested_at.items():
            failing = self.batchers[tower].counts.failing or tower in self._failures
            if failing and time.time() - tested_at > TESTED_AGAIN_S:
                self._test(tower)
        towers = {}
        for tower, facts in self.model.info()["towers"].items():
            towers[tower] = {
                "status": "failing" if tower in self._failures else "ok",
                **{name: facts[name] for name in ("backend", "device", "providers", "precision") if name in facts},
                "self_test": {**facts["self_test"], "age_seconds": round(time.time() - self._tested_at[tower], 1)},
                **({"error": self._failures[tower]} if tower in self._failures else {}),
            }
        return not self._failures, towers

    def close(self) -> int:
        """Stop without waiting for the items that are queued.

        Returns:
            Their number.
        """
        unfinished = sum(batcher.close() for batcher in self.batchers.values())
        self._preparation.close()
        return unfinished

    def _test(self, tower: str) -> None:
        self._tested_at[tower] = time.time()
        try:
            for model in {self.model, self._parallel_model}:
                model.encoders[tower].check()
        except JinaClipError as error:
            self._failures[tower] = str(error)
        else:
            self._failures.pop(tower, None)
            self.batchers[tower].counts.failing = 0

    def _run_batch(self, tower: str, inputs: Sequence[Any], alone: bool) -> np.ndarray:
        if tower == "text" and len(inputs[0]) > self.model.text_encoder.session.cost.tokens:
            with self._long_text:  # such a text is a batch of its own
                return self.model.text_encoder.run(inputs)
        model = self.model if alone else self._parallel_model
        return model.encoders[tower].run(inputs)

    def _observe(self, tower: str, waited: Sequence[float], seconds: float) -> None:
        for wait in waited:
            self.metrics.stages.labels(tower, "wait").observe(wait)
        self.metrics.stages.labels(tower, "run").observe(seconds)
