"""A model behind two queues: items of requests to vectors, prepared beside the runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect

from jinaclip.batching import Batcher, choose_images, choose_texts
from jinaclip.errors import InputError
from jinaclip.image import MAX_PIXELS, open_image, resize, to_rgb
from jinaclip.model import ClipModel
from jinaclip.server.answers import image_tokens
from jinaclip.server.problems import Problem, invalid, problem_of
from jinaclip.server.requests import EmbeddingRequest, Picture, Text


@dataclass(frozen=True)
class Prepared:
    """An item that is ready to run.

    Attributes:
        tower: "text" or "image".
        value: ids of a text, or pixels uint8 [size, size, 3].
        tokens: what it counts as.
    """

    tower: str
    value: list[int] | np.ndarray
    tokens: int


class Service:
    """Answers requests with one model. Used from one event loop.

    Args:
        model: opened; closed by its owner.
        queue: most texts, and most images, that wait.
        max_tokens: of a text, special tokens and instruction included; None for what the model takes.
        max_pixels: of a picture.
    """

    def __init__(
        self, model: ClipModel, *, queue: int = 1024, max_tokens: int | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.model = model
        self.max_tokens = min(max_tokens or model.max_tokens, model.max_tokens)
        self._max_pixels = max_pixels
        self.texts: Batcher[list[int]] | None = None
        self.images: Batcher[np.ndarray] | None = None
        sessions = model.info()["towers"]
        if "text" in sessions:
            session = model.session("text")
            choose = partial(choose_texts, tower=model.bundle.tower("text"), cost=session.cost)
            self.texts = Batcher("text", model.embed_ids, choose, limit=queue, workers=session.concurrency)
        if "image" in sessions:
            session = model.session("image")
            self.images = Batcher(
                "image", model.embed_pixels, partial(choose_images, cost=session.cost), limit=queue,
                workers=session.concurrency,
            )  # fmt: skip
        threads = max(2, max(model.session(tower).threads for tower in sessions))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="jinaclip-prepare")

    async def prepare(self, request: EmbeddingRequest) -> list[Prepared | Problem]:
        """Texts to ids, pictures to pixels, in threads; an item that cannot be used is its problem in place."""
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(self._pool, self._prepare, item, index, request.task, request.truncate)
            for index, item in enumerate(request.items)
            if not isinstance(item, Problem)
        ]
        done = iter(await asyncio.gather(*jobs))
        return [item if isinstance(item, Problem) else next(done) for item in request.items]

    async def vectors(self, items: Sequence[Prepared]) -> list[np.ndarray]:
        """Raw vectors [D], in order. When the caller is cancelled, what still waits is dropped.

        Raises:
            Overloaded: a queue has no room.
        """
        futures: list[Future[np.ndarray]] = []
        try:
            by_tower = {
                "text": self._submit(self.texts, [item.value for item in items if item.tower == "text"], futures),
                "image": self._submit(self.images, [item.value for item in items if item.tower == "image"], futures),
            }
            ordered = [next(by_tower[item.tower]) for item in items]
            return list(await asyncio.gather(*(asyncio.wrap_future(future) for future in ordered)))
        finally:
            for future in futures:
                future.cancel()  # nothing, once it runs or is done

    def close(self, grace_s: float) -> int:
        """Finish what is accepted, for so long; the number of items that were not."""
        left = sum(batcher.close(grace_s) for batcher in (self.texts, self.images) if batcher is not None)
        self._pool.shutdown(wait=False, cancel_futures=True)
        return left

    @staticmethod
    def _submit(
        batcher: Batcher[Any] | None, values: Sequence[Any], futures: list[Any]
    ) -> Iterator[Future[np.ndarray]]:
        if not values:
            return iter(())
        assert batcher is not None  # `prepare` refused what has none
        added = batcher.submit(values)
        futures += added
        return iter(added)

    def _prepare(self, item: Text | Picture, index: int, task: str | None, cut: bool) -> Prepared | Problem:
        try:
            return self._text(item, index, task, cut) if isinstance(item, Text) else self._picture(item, index)
        except Problem as problem:
            return problem
        except InputError as error:
            return problem_of(InputError(str(error), index=index))

    def _text(self, item: Text, index: int, task: str | None, cut: bool) -> Prepared:
        if self.texts is None:
            raise invalid("input", f"input[{index}] is a text, and this server has no text tower", index=index)
        try:
            (ids,) = self.model.token_ids([item.text], task=task)
        except InputError as error:
            raise InputError(str(error).removeprefix("text 0 ")) from error
        if len(ids) > self.max_tokens:
            if not cut:
                raise invalid(
                    "input",
                    f"input[{index}] has {len(ids)} tokens, at most {self.max_tokens} are taken; send less, or "
                    "truncate: true",
                    code="too_many_tokens",
                    index=index,
                )
            ids = [*ids[: self.max_tokens - 1], ids[-1]]
        return Prepared("text", ids, len(ids))

    def _picture(self, item: Picture, index: int) -> Prepared:
        if self.images is None:
            raise invalid("input", f"input[{index}] is an image, and this server has no image tower", index=index)
        image = open_image(item.content, max_pixels=self._max_pixels)
        tokens = image_tokens(image.width, image.height)
        return Prepared("image", resize(to_rgb(image), self.model.bundle.preprocessing), tokens)


@contextlib.asynccontextmanager
async def cancelled_with(client_left: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Break the block off when the client leaves.

    Raises:
        ClientDisconnect: it did.
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
