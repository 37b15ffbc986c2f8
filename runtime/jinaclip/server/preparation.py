"""Items of requests to token ids and pixels, in threads beside the batches that run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jinaclip.errors import InputError, JinaClipError
from jinaclip.model import ClipModel
from jinaclip.preprocessing.image import resize, to_rgb
from jinaclip.preprocessing.image_sources import MAX_PIXELS, open_image
from jinaclip.server.apis.answers import image_tokens
from jinaclip.server.apis.items import Address, Encoded, Item, Text, Tokens, picture_of
from jinaclip.server.errors import Problem, invalid, problem_of
from jinaclip.server.fetch import Fetcher
from jinaclip.server.metrics import Metrics

TEXTS_A_JOB = 32  # texts that one thread tokenises together


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


class Preparation:
    """Prepares items for the batches of a model. Use it from one event loop.

    Args:
        model: the open model.
        max_tokens: the most tokens in a text.
        limits: limits on images.
        metrics: the counters to update.
        fetcher: downloads images from URLs; None to reject URLs.
    """

    def __init__(
        self, model: ClipModel, max_tokens: int, limits: Limits, metrics: Metrics, fetcher: Fetcher | None
    ) -> None:
        self._model, self._max_tokens, self._limits = model, max_tokens, limits
        self._metrics, self._fetcher = metrics, fetcher
        threads = max(2, max(encoder.session.threads for encoder in model.encoders.values()))
        # Two pools, so that texts do not wait behind the images of other requests.
        self._tokenising = ThreadPoolExecutor(threads, thread_name_prefix="jinaclip-tokenise")
        self._decoding = ThreadPoolExecutor(threads, thread_name_prefix="jinaclip-decode")

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

    def close(self) -> None:
        """Drop what has not started."""
        for pool in (self._tokenising, self._decoding):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _fetched(self, url: str) -> bytes:
        if self._fetcher is None:
            raise invalid("input", "is a URL, and this server does not fetch URLs; send the image as base64 or as a "
                                   "data: URI, or start the server with --fetch-urls", code="no_fetching")  # fmt: skip
        if "image" not in self._model.encoders:
            raise _no_image_tower()
        with self._metrics.stages.labels("image", "fetch").time():
            return await self._fetcher.fetch(url)

    def _texts(self, items: Sequence[Text | Tokens], task: str | None, truncate: bool) -> list[Prepared | Problem]:
        with self._metrics.stages.labels("text", "tokenise").time():
            texts = [item.text for item in items if isinstance(item, Text)]
            try:
                if "text" not in self._model.encoders:
                    raise invalid("input", "is a text, but this server has no text tower", code="no_text_tower")
                rows = iter(self._model.text_encoder.prepare(texts, task=task))
            except JinaClipError as error:
                return [problem_of(error)] * len(items)
            return [
                self._text(next(rows), truncate) if isinstance(item, Text) else self._tokens(item.ids, task, truncate)
                for item in items
            ]

    def _tokens(self, ids: list[int], task: str | None, truncate: bool) -> Prepared | Problem:
        """Check token ids sent by a client; those that this tokenizer cannot produce are rejected."""
        special, size = self._model.bundle.special_ids, self._model.bundle.vocab_size
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
        if len(ids) > self._max_tokens:
            if not truncate:
                return invalid("input", f"has {len(ids)} tokens, the limit is {self._max_tokens}; send a shorter text, "
                                        "or set truncate to true", code="too_many_tokens")  # fmt: skip
            ids = [*ids[: self._max_tokens - 1], ids[-1]]
        return Prepared("text", ids, len(ids))

    def _picture(self, content: bytes | str) -> Prepared | Problem:
        with self._metrics.stages.labels("image", "decode").time():
            try:
                if "image" not in self._model.encoders:
                    raise _no_image_tower()
                file = picture_of(content, self._limits.image_bytes) if isinstance(content, str) else content
                image = open_image(file, max_pixels=self._limits.pixels)
                tokens = image_tokens(image.width, image.height)
                return Prepared("image", resize(to_rgb(image), self._model.bundle.preprocessing), tokens)
            except Problem as problem:
                return problem
            except InputError as error:
                return problem_of(InputError(f"cannot be decoded as an image: {error}"))


def _no_image_tower() -> Problem:
    return invalid("input", "is an image, but this server has no image tower", code="no_image_tower")
