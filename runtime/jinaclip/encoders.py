"""Encoders for the two towers: preprocessing, batching, the memory check, inference and the self-test."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from typing import TypeVar

import numpy as np

from jinaclip.backends.base import Session
from jinaclip.backends.cost import RELEASE_BYTES, is_tiled, require_memory
from jinaclip.backends.self_test import run_self_test
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import InputError
from jinaclip.packing import pack_texts
from jinaclip.preprocessing.image import preprocess
from jinaclip.preprocessing.image_sources import ImageInput
from jinaclip.preprocessing.text import instruction_of

INTERRUPTIBLE_TOKENS = 256  # batches of this many tokens or more can be interrupted with Ctrl-C
S = TypeVar("S")
T = TypeVar("T")


class TextEncoder:
    """The text tower: turns texts into token ids, and token ids into raw vectors. Safe to use from several threads.

    Args:
        bundle: the bundle that the graph belongs to.
        precision: the graph's precision.
        session: the session that runs the graph. The caller closes it.

    Attributes:
        tokenizer: the bundle's tokenizer.
        self_test: the last result of `check`.

    Examples:
        >>> ids = model.text_encoder.prepare(["a cup of coffee"], task="retrieval.query")
        >>> vectors = model.text_encoder.run(ids)
    """

    def __init__(self, bundle: Bundle, precision: str, session: Session) -> None:
        self.bundle, self.precision, self.session = bundle, precision, session
        self.tokenizer = bundle.open_tokenizer()
        self.self_test: dict[str, float | bool] = {}

    def check(self, *, always: bool = True) -> dict[str, float | bool]:
        """Run the self-test, which compares the session's vectors with the bundle's golden vectors.

        Args:
            always: run it even if an earlier pass is recorded.

        Returns:
            {"ratio": largest error ÷ distance to the nearest other golden vector, "remembered": bool}. "remembered"
            is True if the result is that of an earlier run.

        Raises:
            SelfTestFailed: the vectors are wrong.
            BackendError: inference failed.

        Examples:
            >>> model.text_encoder.check()
            {'ratio': ..., 'remembered': False}
        """
        self.self_test = run_self_test(
            self.bundle, "text", self.precision, self.session, tokenizer=self.tokenizer, always=always
        )
        return self.self_test

    def prepare(
        self, texts: Sequence[str], *, task: str | None = None, max_length: int | None = None
    ) -> list[list[int]]:
        """Tokenize texts. The ids include the special tokens and the task's instruction.

        Args:
            texts: the texts.
            task: one of the bundle's tasks. None uses the bundle's default.
            max_length: number of tokens kept of each text. None keeps all.

        Returns:
            The token ids of each text.

        Raises:
            InputError: a text or the task is invalid, or `max_length` is too small for a single token of the text.

        Examples:
            >>> model.text_encoder.prepare(["a cup of coffee"])  # <s>, the text's tokens, </s>
            [[0, ..., 2]]
        """
        instruction = instruction_of(task, self.bundle.tasks, self.bundle.default_task)
        if max_length is None:
            return self.tokenizer.encode(texts, instruction=instruction)
        least, most = len(self.tokenizer.encode([instruction])[0]) + 1, self.bundle.max_tokens
        if type(max_length) is not int or not least <= max_length <= max(most, 8192):  # the default of `encode_text`
            expected = f"a whole number from {least} (<s>, </s> and the task's instruction count) to {most}"
            raise InputError(f"max_length is {max_length!r}, expected {expected}")
        return self.tokenizer.truncated(self.tokenizer.encode(texts, instruction=instruction), min(max_length, most))

    def run(self, rows: Sequence[list[int]]) -> np.ndarray:
        """Run texts as one batch.

        Args:
            rows: token ids of each text.

        Returns:
            Raw vectors, float32 [N, D].

        Raises:
            InputError: a text has no tokens or too many, an id is not in the vocabulary, or the batch needs more
                memory than is available.
            BackendError: inference failed, or the model is closed.

        Examples:
            >>> ids = model.text_encoder.prepare(["a cat", "un chat"])
            >>> model.text_encoder.run(ids).shape == (2, model.dims[-1])
            True
        """
        if not rows:
            return np.empty((0, self.bundle.dims[-1]), np.float32)
        most, vocab_size = self.bundle.max_tokens, self.bundle.vocab_size
        for index, row in enumerate(rows):
            if not 0 < len(row) <= most:
                raise InputError(f"text {index} has {len(row)} tokens, expected 1 to {most}", index=index)
        padded = self.tokenizer.padded(rows)
        if padded.min() < 0 or padded.max() >= vocab_size:  # GPU kernels do not check this
            index = int(((padded < 0) | (padded >= vocab_size)).any(1).argmax())
            problem = f"text {index} has token ids outside the vocabulary"
            raise InputError(f"{problem}, expected 0 to {vocab_size - 1}", index=index)
        return self.run_padded(padded)

    def run_padded(self, ids: np.ndarray) -> np.ndarray:
        """Run a padded batch.

        Args:
            ids: token ids, int64 [N, T], padded on the right.

        Returns:
            Raw vectors, float32 [N, D].

        Raises:
            InputError: the batch needs more memory than is available.
            BackendError: inference failed, or the model is closed.

        Examples:
            >>> ids = model.text_encoder.tokenizer.padded([[0, 5, 2], [0, 5, 7, 2]])
            >>> vectors = model.text_encoder.run_padded(ids)
        """
        manifest, session = self.bundle.tower("text"), self.session
        release = False
        if session.cost.writes_scores:  # CPU sessions only: a GPU session needs no host memory for the scores
            tiled = is_tiled(ids, self.tokenizer.pad, session.cost.tiled_above)
            release = require_memory(ids.shape[0], ids.shape[1], manifest, tiled=tiled) > RELEASE_BYTES
        interruptible, output = ids.size >= INTERRUPTIBLE_TOKENS, "text_embeddings"
        inputs = {manifest.input_name: ids}
        return session.run(inputs, outputs=[output], interruptible=interruptible, release_memory=release)[output]

    def run_all(
        self, rows: Sequence[list[int]], *, batch_size: int | None = None
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Run any number of texts, batch by batch.

        Args:
            rows: token ids of each text.
            batch_size: the largest number of texts in a batch. None chooses the fastest batches.

        Yields:
            The indices of a batch's texts, and their raw vectors, float32 [texts of the batch, D].

        Raises:
            InputError, BackendError: as for `run`.

        Examples:
            >>> ids = model.text_encoder.prepare(["a cup of coffee", "a cat"])
            >>> vectors = np.empty((len(ids), model.dims[-1]), np.float32)
            >>> for batch, rows in model.text_encoder.run_all(ids):
            ...     vectors[batch] = rows
        """
        lengths, cost = [len(row) for row in rows], self.session.cost
        batches = pack_texts(lengths, self.bundle.tower("text"), batch_size=batch_size, cost=cost)
        inputs = ([rows[i] for i in batch] for batch in batches)
        yield from zip(batches, _in_flight(self.run, inputs, self.session.concurrency), strict=True)


class ImageEncoder:
    """The image tower: turns images into pixels, and pixels into raw vectors. Safe to use from several threads.

    Args:
        bundle: the bundle that the graph belongs to.
        precision: the graph's precision.
        session: the session that runs the graph. The caller closes it.

    Attributes:
        self_test: the last result of `check`.

    Examples:
        >>> pixels = model.image_encoder.prepare("coffee.jpg")
        >>> vectors = model.image_encoder.run([pixels])
    """

    def __init__(self, bundle: Bundle, precision: str, session: Session) -> None:
        self.bundle, self.precision, self.session = bundle, precision, session
        self.self_test: dict[str, float | bool] = {}

    def check(self, *, always: bool = True) -> dict[str, float | bool]:
        """Run the self-test, which compares the session's vectors with the bundle's golden vectors.

        Args:
            always: run it even if an earlier pass is recorded.

        Returns:
            {"ratio": largest error ÷ distance to the nearest other golden vector, "remembered": bool}. "remembered"
            is True if the result is that of an earlier run.

        Raises:
            SelfTestFailed: the vectors are wrong.
            BackendError: inference failed.

        Examples:
            >>> model.image_encoder.check()
            {'ratio': ..., 'remembered': False}
        """
        self.self_test = run_self_test(self.bundle, "image", self.precision, self.session, always=always)
        return self.self_test

    def prepare(
        self, image: ImageInput, *, resize_mode: str | None = None, exif_transpose: bool = False,
        allow_urls: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Read and resize an image.

        Args:
            image: a path, data: URI, bytes, binary file, PIL image or uint8 array [height, width, 3].
            resize_mode, exif_transpose, allow_urls: as in `ClipModel.encode_image`.

        Returns:
            RGB values from 0 to 255, uint8 [size, size, 3].

        Raises:
            InputError: the image cannot be used.

        Examples:
            >>> pixels = model.image_encoder.prepare("coffee.jpg")
            >>> pixels.shape, pixels.dtype
            ((..., ..., 3), dtype('uint8'))
        """
        how = self.bundle.preprocessing
        return preprocess(image, how, resize_mode=resize_mode, exif_transpose=exif_transpose, allow_urls=allow_urls)

    def run(self, pixels: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Run images as one batch.

        Args:
            pixels: uint8 [size, size, 3] for each image, or one array [N, size, size, 3].

        Returns:
            Raw vectors, float32 [N, D].

        Raises:
            InputError: an array has another dtype or shape.
            BackendError: inference failed, or the model is closed.

        Examples:
            >>> pixels = [model.image_encoder.prepare(path) for path in ("coffee.jpg", "cat.jpg")]
            >>> model.image_encoder.run(pixels).shape == (2, model.dims[-1])
            True
        """
        if not len(pixels):
            return np.empty((0, self.bundle.dims[-1]), np.float32)
        size = self.bundle.preprocessing.size
        for index, array in enumerate(pixels):
            if array.dtype != np.uint8 or array.shape != (size, size, 3):
                found = f"image {index} is {array.dtype} {list(array.shape)}"
                raise InputError(f"{found}, expected uint8 {[size, size, 3]}", index=index)
        output = "image_embeddings"
        inputs = {self.bundle.tower("image").input_name: self.bundle.image_input(np.stack(list(pixels)))}
        return self.session.run(inputs, outputs=[output], interruptible=True)[output]

    def run_all(
        self, images: Iterable[ImageInput], *, batch_size: int | None = None, resize_mode: str | None = None,
        exif_transpose: bool = False, allow_urls: bool = False,
    ) -> Iterator[np.ndarray | InputError]:  # fmt: skip
        """Run any number of images. Other threads read and resize the next images while the model runs.

        Args:
            images: the images.
            batch_size: number of images in a batch. None uses the fastest size for the device.
            resize_mode, exif_transpose, allow_urls: as for `prepare`.

        Yields:
            For each image, in order, its raw vector, float32 [D], or an InputError if the image cannot be used.

        Raises:
            InputError: `resize_mode` is not a mode.
            BackendError: inference failed, or the model is closed.

        Examples:
            >>> paths = ["coffee.jpg", "missing.jpg"]
            >>> results = model.image_encoder.run_all(paths)
            >>> [path for path, result in zip(paths, results) if not isinstance(result, InputError)]
            ['coffee.jpg']
        """
        mode = self.bundle.preprocessing.mode_of(resize_mode)  # an error of the call, not of its first image

        def read(image: ImageInput) -> np.ndarray | InputError:
            try:
                return self.prepare(image, resize_mode=mode, exif_transpose=exif_transpose, allow_urls=allow_urls)
            except InputError as error:
                return error

        size, threads = batch_size or self.session.cost.images, self.session.threads
        pool = ThreadPoolExecutor(threads, "jinaclip-image")
        with closing(_submitted(pool, read, images, ahead=threads + size * (self.session.concurrency - 1))) as pixels:
            batches = iter(lambda: [future.result() for future in islice(pixels, size)], [])
            for vectors in _in_flight(self._run_good, batches, self.session.concurrency):
                yield from vectors

    def _run_good(self, pixels: Sequence[np.ndarray | InputError]) -> list[np.ndarray | InputError]:
        """Run the images that could be read. The errors of the others stay in their places."""
        good = [p for p in pixels if not isinstance(p, InputError)]
        vectors = iter(self.run(good))
        return [p if isinstance(p, InputError) else next(vectors) for p in pixels]


Encoder = TextEncoder | ImageEncoder
ENCODERS: dict[str, type[TextEncoder] | type[ImageEncoder]] = {"text": TextEncoder, "image": ImageEncoder}


def _in_flight(run: Callable[[S], T], batches: Iterable[S], concurrency: int) -> Iterator[T]:
    """Run batches; yield the results, in order. `concurrency` of them run at the same time; 1 uses this thread."""
    batches = iter(batches)
    first = list(islice(batches, min(concurrency, 2)))
    if len(first) < 2:  # one run at a time, or a single run: no other thread is needed
        yield from map(run, chain(first, batches))
        return
    pool = ThreadPoolExecutor(concurrency, "jinaclip-run")
    for future in _submitted(pool, run, chain(first, batches), concurrency):
        yield future.result()


def _submitted(
    pool: ThreadPoolExecutor, call: Callable[[S], T], arguments: Iterable[S], ahead: int
) -> Generator[Future[T], None, None]:
    """Submit a call for each argument and yield the futures, in order.

    Args:
        pool: runs the calls. It is shut down at the end.
        call: the function to call.
        arguments: its argument in each call.
        ahead: number of calls that are submitted after the one whose future is yielded.
    """
    futures: deque[Future[T]] = deque()
    try:
        for argument in arguments:
            futures.append(pool.submit(call, argument))
            if len(futures) > ahead:
                yield futures.popleft()
        yield from futures
    finally:
        pool.shutdown(cancel_futures=True)
