"""The embedding service: a model behind one queue per tower. Items are prepared in threads while batches run."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect

from jinaclip.errors import InputError, JinaClipError
from jinaclip.model import ClipModel
from jinaclip.preprocessing.image import resize, to_rgb
from jinaclip.preprocessing.image_sources import MAX_PIXELS, open_image
from jinaclip.server.admission import Room
from jinaclip.server.apis.answers import image_tokens
from jinaclip.server.apis.items import Address, Encoded, Item, Text, Tokens, picture_of
from jinaclip.server.errors import Problem, invalid, problem_of
from jinaclip.server.fetch import Fetcher
from jinaclip.server.metrics import Metrics
from jinaclip.server.queue import Batcher, choose_images, choose_texts

TEXTS_A_JOB = 32  # texts that one thread tokenises together
TESTED_AGAIN_S = 10.0  # the shortest time between two self-tests of a tower whose runs fail


@dataclass(frozen=True)
class Limits:
    """Limits of the service.

    Attributes:
        queue_texts, queue_images: the most items that are accepted and not answered yet.
        tokens: the most tokens in a text, including special tokens and instruction; None for the model's limit.
        image_bytes: the largest size of an image file, in bytes.
        pixels: the most pixels in an image.
        gather_s: how long an idle queue waits for more items before it runs the first, in seconds.
    """

    queue_texts: int = 4096
    queue_images: int = 256
    tokens: int | None = None
    image_bytes: int = 32 << 20
    pixels: int = MAX_PIXELS
    gather_s: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """An item that is ready to run.

    Attributes:
        tower: "text" or "image".
        value: the token ids of a text, or the pixels of an image, uint8 [size, size, 3].
        tokens: the number of tokens counted for usage.
    """

    tower: str
    value: list[int] | np.ndarray
    tokens: int


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
        self.model, self._fetcher, self._narrow = model, fetcher, narrow
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
        threads = max(2, max(encoder.session.threads for encoder in model.encoders.values()))
        # Two pools, so that texts do not wait behind the images of other requests.
        self._tokenising = ThreadPoolExecutor(threads, thread_name_prefix="jinaclip-tokenise")
        self._decoding = ThreadPoolExecutor(threads, thread_name_prefix="jinaclip-decode")

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
            prepare = [self.prepare(items, name, task=task, truncate=truncate) for name, items in fields]
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

    async def prepare(
        self, items: Sequence[Item | Problem], field: str, *, task: str | None, truncate: bool
    ) -> list[Prepared | Problem]:
        """Tokenise texts and fetch and decode images, in threads.

        Args:
            items: the items of one request field. Problems are passed through.
            field: the name of the field, for messages.
            task: a task of the bundle, or None.
            truncate: True to truncate texts that are too long.

        Returns:
            One result per item; a Problem for an invalid one.
        """
        done: list[Prepared | Problem | None] = [item if isinstance(item, Problem) else None for item in items]
        texts = [index for index, item in enumerate(items) if isinstance(item, Text | Tokens)]
        groups = [texts[start : start + TEXTS_A_JOB] for start in range(0, len(texts), TEXTS_A_JOB)]
        loop = asyncio.get_running_loop()

        async def run_texts(group: list[int]) -> None:
            rows = [item for index in group if isinstance(item := items[index], Text | Tokens)]
            found = await loop.run_in_executor(self._tokenising, self._texts, rows, task, truncate)
            for index, prepared in zip(group, found, strict=True):
                done[index] = prepared

        async def run_picture(index: int, item: Encoded | Address) -> None:
            try:
                content = await self._fetched(item.url) if isinstance(item, Address) else item.value
                done[index] = await loop.run_in_executor(self._decoding, self._picture, content)
            except Problem as problem:
                done[index] = problem

        pictures = [(i, item) for i, item in enumerate(items) if isinstance(item, Encoded | Address)]
        await asyncio.gather(*map(run_texts, groups), *(run_picture(index, item) for index, item in pictures))
        found = [item for item in done if item is not None]
        assert len(found) == len(items)
        given = [isinstance(item, Problem) for item in items]
        return [
            item.at(field, index) if isinstance(item, Problem) and not given[index] else item
            for index, item in enumerate(found)
        ]

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
        for pool in (self._tokenising, self._decoding):
            pool.shutdown(wait=False, cancel_futures=True)
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

    async def _fetched(self, url: str) -> bytes:
        if self._fetcher is None:
            raise invalid("input", "is a URL, and this server does not fetch URLs; send the image as base64 or as a "
                                   "data: URI, or start the server with --fetch-urls", code="no_fetching")  # fmt: skip
        if "image" not in self.batchers:
            raise _no_image_tower()
        with self._metrics.stages.labels("image", "fetch").time():
            return await self._fetcher.fetch(url)

    def _texts(self, items: Sequence[Text | Tokens], task: str | None, truncate: bool) -> list[Prepared | Problem]:
        with self._metrics.stages.labels("text", "tokenise").time():
            texts = [item.text for item in items if isinstance(item, Text)]
            try:
                if "text" not in self.batchers:
                    raise invalid("input", "is a text, but this server has no text tower", code="no_text_tower")
                rows = iter(self.model.text_encoder.prepare(texts, task=task))
            except JinaClipError as error:
                return [problem_of(error)] * len(items)
            return [
                self._text(next(rows), truncate) if isinstance(item, Text) else self._tokens(item.ids, task, truncate)
                for item in items
            ]

    def _tokens(self, ids: list[int], task: str | None, truncate: bool) -> Prepared | Problem:
        """Check token ids sent by a client; those that this tokenizer cannot produce are rejected."""
        special, size = self.model.bundle.special_ids, self.model.bundle.vocab_size
        if task is not None:
            what = "contains token ids, and a task's instruction can only be added to text; remove task or send text"
        elif len(ids) < 2 or ids[0] != special["bos"] or ids[-1] != special["eos"]:
            what = (f"does not match this tokenizer: token ids must begin with {special['bos']} (<s>) and end with "
                    f"{special['eos']} (</s>)")  # fmt: skip
        elif not 0 <= min(ids) <= max(ids) < size:
            what = f"contains the token id {max(ids) if max(ids) >= size else min(ids)}, expected 0 to {size - 1}"
        elif special["pad"] in ids:
            what = f"contains the padding token id {special['pad']}; send token ids without padding"
        else:
            return self._text(ids, truncate)
        return invalid("input", what, code="token_ids")

    def _text(self, ids: list[int], truncate: bool) -> Prepared | Problem:
        if len(ids) > self.max_tokens:
            if not truncate:
                return invalid("input", f"has {len(ids)} tokens, the limit is {self.max_tokens}; send a shorter text, "
                                        "or set truncate to true", code="too_many_tokens")  # fmt: skip
            ids = [*ids[: self.max_tokens - 1], ids[-1]]
        return Prepared("text", ids, len(ids))

    def _picture(self, content: bytes | str) -> Prepared | Problem:
        with self._metrics.stages.labels("image", "decode").time():
            try:
                if "image" not in self.batchers:
                    raise _no_image_tower()
                file = picture_of(content, self._limits.image_bytes) if isinstance(content, str) else content
                image = open_image(file, max_pixels=self._limits.pixels)
                tokens = image_tokens(image.width, image.height)
                return Prepared("image", resize(to_rgb(image), self.model.bundle.preprocessing), tokens)
            except Problem as problem:
                return problem
            except InputError as error:
                return problem_of(InputError(f"cannot be decoded as an image: {error}"))


def _no_image_tower() -> Problem:
    return invalid("input", "is an image, but this server has no image tower", code="no_image_tower")


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
