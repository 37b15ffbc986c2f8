"""Preparation of items: texts to token ids and images to pixels, in threads, while batches run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jinaclip.errors import InputError
from jinaclip.model import ClipModel
from jinaclip.preprocessing.image import resize, to_rgb
from jinaclip.preprocessing.image_sources import MAX_PIXELS, name_of, open_image, reading
from jinaclip.server.apis.answers import image_tokens
from jinaclip.server.apis.items import ImageFile, ImageUrl, Item, Text, TokenIds, decode_image_file
from jinaclip.server.errors import Problem, invalid
from jinaclip.server.fetch import Fetcher
from jinaclip.server.metrics import Metrics

TEXTS_PER_CALL = 32  # texts that one thread tokenises together


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

    async def prepare(self, items: Sequence[Item], *, task: str | None, truncate: bool) -> None:
        """Tokenise texts, and fetch and decode images. Sets model_input and tokens, or the problem of each item.

        Args:
            items: items of towers that the model has.
            task: a task of the bundle, or None.
            truncate: True to truncate texts that are too long.
        """
        texts = [item for item in items if item.tower == "text"]
        groups = [texts[start : start + TEXTS_PER_CALL] for start in range(0, len(texts), TEXTS_PER_CALL)]
        images = [(item, item.content) for item in items if isinstance(item.content, ImageFile | ImageUrl)]
        run = asyncio.get_running_loop().run_in_executor
        await asyncio.gather(
            *(run(self._tokenising, self._prepare_texts, group, task, truncate) for group in groups),
            *(self._prepare_image(item, image) for item, image in images),
        )

    def close(self) -> None:
        """Drop what has not started."""
        for pool in (self._tokenising, self._decoding):
            pool.shutdown(wait=False, cancel_futures=True)

    def _prepare_texts(self, items: Sequence[Item], task: str | None, truncate: bool) -> None:
        with self._metrics.stages.labels("text", "tokenise").time():
            texts = [item.content.text for item in items if isinstance(item.content, Text)]
            rows = iter(self._model.text_encoder.prepare(texts, task=task))
            for item in items:
                try:
                    given = item.content
                    ids = self._checked(given.ids, task) if isinstance(given, TokenIds) else next(rows)
                    item.model_input = self._shortened(ids, truncate)
                    item.tokens = len(item.model_input)
                except Problem as problem:
                    item.fail(problem)

    def _checked(self, ids: list[int], task: str | None) -> list[int]:
        """Check token ids sent by a client; those that this tokenizer cannot produce are rejected."""
        special, size = self._model.bundle.special_ids, self._model.bundle.vocab_size
        bos, eos = special["bos"], special["eos"]
        if task is not None:
            what = "contains token ids, and a task's instruction can only be added to text; remove task or send text"
        elif len(ids) < 2 or ids[0] != bos or ids[-1] != eos:
            what = f"does not match this tokenizer: token ids must begin with {bos} (<s>) and end with {eos} (</s>)"
        elif not 0 <= min(ids) <= max(ids) < size:
            what = f"contains the token id {max(ids) if max(ids) >= size else min(ids)}, expected 0 to {size - 1}"
        elif special["pad"] in ids:
            what = f"contains the padding token id {special['pad']}; send token ids without padding"
        else:
            return ids
        raise invalid("input", what, code="token_ids")

    def _shortened(self, ids: list[int], truncate: bool) -> list[int]:
        """Apply the limit on the tokens of a text."""
        if len(ids) <= self._max_tokens:
            return ids
        if not truncate:
            what = f"has {len(ids)} tokens, the limit is {self._max_tokens}"
            raise invalid("input", f"{what}; send a shorter text, or set truncate to true", code="too_many_tokens")
        return [*ids[: self._max_tokens - 1], ids[-1]]

    async def _prepare_image(self, item: Item, image: ImageFile | ImageUrl) -> None:
        try:
            file = await self._downloaded(image.url) if isinstance(image, ImageUrl) else image.encoded
            run = asyncio.get_running_loop().run_in_executor
            item.model_input, item.tokens = await run(self._decoding, self._decoded, file)
        except Problem as problem:
            item.fail(problem)

    async def _downloaded(self, url: str) -> bytes:
        if self._fetcher is None:
            what = "is a URL, and this server does not fetch URLs"
            advice = "send the image as base64 or as a data: URI, or start the server with --fetch-urls"
            raise invalid("input", f"{what}; {advice}", code="no_fetching")
        with self._metrics.stages.labels("image", "fetch").time():
            return await self._fetcher.fetch(url)

    def _decoded(self, content: str | bytes) -> tuple[np.ndarray, int]:
        """The pixels of an image and its number of tokens.

        Args:
            content: the file, or its base64 or data: URI.
        """
        with self._metrics.stages.labels("image", "decode").time():
            file = decode_image_file(content, self._limits.image_bytes) if isinstance(content, str) else content
            try:
                image = open_image(file, max_pixels=self._limits.pixels)
                with reading(name_of(file)):
                    pixels = resize(to_rgb(image), self._model.bundle.preprocessing)
                return pixels, image_tokens(image.width, image.height)
            except InputError as error:
                raise invalid("input", f"cannot be decoded as an image: {error}", code="invalid_input") from None
