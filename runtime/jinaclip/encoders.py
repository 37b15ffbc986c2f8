"""The towers as encoders: inputs to raw vectors, with preprocessing, batching, the memory limit and the self-test."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np

from jinaclip.backends.base import Session
from jinaclip.backends.cost import RELEASE_BYTES, is_tiled, require_memory
from jinaclip.backends.self_test import run_self_test
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import InputError
from jinaclip.packing import pack_texts
from jinaclip.preprocessing.image import RESIZE_MODES, preprocess
from jinaclip.preprocessing.image_sources import ImageInput
from jinaclip.preprocessing.text import instruction_of

INTERRUPTIBLE_TOKENS = 256  # a batch of more tokens takes long enough for Ctrl-C to matter
T = TypeVar("T")


class TextEncoder:
    """The text tower: texts to token ids, token ids to raw vectors. Safe to use from several threads at once.

    Args:
        bundle: that the graph is from.
        precision: of the graph.
        session: that runs it; closed by its owner.

    Attributes:
        tokenizer: the bundle's.
        self_test: what `check` returned last.
    """

    tower = "text"

    def __init__(self, bundle: Bundle, precision: str, session: Session) -> None:
        self.bundle, self.precision, self.session = bundle, precision, session
        self.tokenizer = bundle.open_tokenizer()
        self.self_test: dict[str, float | bool] = {}

    def check(self, *, always: bool = True) -> dict[str, float | bool]:
        """Run the self-test: compare with the bundle's golden vectors.

        Args:
            always: run it even if a pass is remembered beside the bundle.

        Returns:
            {"ratio": worst error ÷ distance to the nearest other golden, "remembered": bool}.

        Raises:
            SelfTestFailed: the vectors are wrong. BackendError: there are none.
        """
        self.self_test = run_self_test(
            self.bundle, "text", self.precision, self.session, tokenizer=self.tokenizer, always=always
        )
        return self.self_test

    def prepare(
        self, texts: Sequence[str], *, task: str | None = None, max_length: int | None = None
    ) -> list[list[int]]:
        """Token ids of texts, special tokens and the task's instruction included.

        Args:
            task: one of the bundle's tasks; None for its default.
            max_length: tokens kept of each text; None keeps all.

        Raises:
            InputError: a text or the task cannot be used, or max_length leaves no room for a token.
        """
        instruction = instruction_of(task, self.bundle.tasks, self.bundle.default_task)
        limit = max_length
        if max_length is not None:
            limit = _check_max_length(max_length, self.bundle.max_tokens, len(self.tokenizer.encode([instruction])[0]))
        _check_texts(texts)
        rows = self.tokenizer.encode([instruction + text for text in texts])
        return rows if limit is None else self.tokenizer.truncated(rows, limit)

    def run(self, rows: Sequence[list[int]]) -> np.ndarray:
        """Raw vectors, float32 [N, D], of texts that run as one batch.

        Args:
            rows: token ids of each text.

        Raises:
            InputError: a text has no token or more than the model takes, an id is not one of the model's, or the batch
                needs more memory than is free.
        """
        if not rows:
            return np.empty((0, self.bundle.dims[-1]), np.float32)
        most, vocab_size = self.bundle.max_tokens, self.bundle.vocab_size
        for index, row in enumerate(rows):
            if not 0 < len(row) <= most:
                raise InputError(f"text {index} has {len(row)} tokens, expected 1 to {most}", index=index)
        padded = self.tokenizer.padded(rows)
        if padded.min() < 0 or padded.max() >= vocab_size:  # a GPU's kernels do not check
            index = int(((padded < 0) | (padded >= vocab_size)).any(1).argmax())
            raise InputError(f"text {index} has ids that are not from 0 to {vocab_size - 1}", index=index)
        return self.run_padded(padded)

    def run_padded(self, ids: np.ndarray) -> np.ndarray:
        """Raw vectors, float32 [N, D], of ids int64 [N, T], padded at the right.

        Raises:
            InputError: the batch needs more memory than is free.
        """
        manifest, session = self.bundle.tower("text"), self.session
        release = False
        if session.cost.writes_scores:  # into the host's memory: with a GPU nothing of it is needed
            tiled = is_tiled(ids, self.tokenizer.pad, session.tiled_above)
            release = require_memory(ids.shape[0], ids.shape[1], manifest, tiled=tiled) > RELEASE_BYTES
        interruptible, output = ids.size >= INTERRUPTIBLE_TOKENS, "text_embeddings"
        inputs = {manifest.input_name: ids}
        return session.run(inputs, outputs=[output], interruptible=interruptible, release_memory=release)[output]

    def run_all(
        self, rows: Sequence[list[int]], *, batch_size: int | None = None
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Raw vectors of any number of texts, batch by batch.

        Args:
            rows: token ids of each text.
            batch_size: most texts of a batch; None for what is fastest.

        Yields:
            Indices of the texts of a batch, and their vectors.
        """
        lengths, cost = [len(row) for row in rows], self.session.cost
        batches = pack_texts(lengths, self.bundle.tower("text"), batch_size=batch_size, cost=cost)
        runs = (partial(self.run, [rows[i] for i in batch]) for batch in batches)
        yield from zip(batches, _in_flight(runs, self.session.concurrency), strict=True)


class ImageEncoder:
    """The image tower: images to pixels, pixels to raw vectors. Safe to use from several threads at once.

    Args:
        bundle: that the graph is from.
        precision: of the graph.
        session: that runs it; closed by its owner.

    Attributes:
        self_test: what `check` returned last.
    """

    tower = "image"

    def __init__(self, bundle: Bundle, precision: str, session: Session) -> None:
        self.bundle, self.precision, self.session = bundle, precision, session
        self.self_test: dict[str, float | bool] = {}

    def check(self, *, always: bool = True) -> dict[str, float | bool]:
        """Run the self-test, as TextEncoder.check."""
        self.self_test = run_self_test(self.bundle, "image", self.precision, self.session, always=always)
        return self.self_test

    def prepare(
        self, image: ImageInput, *, resize_mode: str | None = None, exif_transpose: bool = False,
        allow_urls: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Pixels uint8 [size, size, 3] of an image; the arguments are those of `ClipModel.encode_image`.

        Raises:
            InputError: it cannot be used.
        """
        return preprocess(
            image, self.bundle.preprocessing, resize_mode=resize_mode, exif_transpose=exif_transpose,
            allow_urls=allow_urls,
        )  # fmt: skip

    def run(self, pixels: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Raw vectors, float32 [N, D], of images that run as one batch.

        Args:
            pixels: uint8 [size, size, 3] of each image, or an array [N, size, size, 3].

        Raises:
            InputError: an array has another dtype or shape.
        """
        if not len(pixels):
            return np.empty((0, self.bundle.dims[-1]), np.float32)
        size = self.bundle.preprocessing.size
        for index, array in enumerate(pixels):
            if array.dtype != np.uint8 or array.shape != (size, size, 3):
                raise InputError(
                    f"image {index} is {array.dtype} {list(array.shape)}, expected uint8 {[size, size, 3]}", index=index
                )
        output = "image_embeddings"
        inputs = {self.bundle.tower("image").input_name: self.bundle.image_input(np.stack(list(pixels)))}
        return self.session.run(inputs, outputs=[output], interruptible=True)[output]

    def run_all(
        self, images: Iterable[ImageInput], *, batch_size: int | None = None, resize_mode: str | None = None,
        exif_transpose: bool = False, allow_urls: bool = False,
    ) -> Iterator[np.ndarray | InputError]:  # fmt: skip
        """Raw vectors [D] of any number of images, in order. Images are read and resized in other threads while the
        model runs.

        Args:
            batch_size: images of a batch; None for what is fastest.
            resize_mode, exif_transpose, allow_urls: as for `prepare`.

        Yields:
            For an image that cannot be used, its InputError.
        """
        if resize_mode is not None and resize_mode not in RESIZE_MODES:
            raise InputError(f"resize_mode is {resize_mode!r}, expected one of {', '.join(RESIZE_MODES)}")
        read = partial(self.prepare, resize_mode=resize_mode, exif_transpose=exif_transpose, allow_urls=allow_urls)
        return self._run_all(iter(images), batch_size or self.session.cost.images, read)

    def _run_all(
        self, images: Iterator[ImageInput], batch_size: int, read: Callable[[ImageInput], np.ndarray]
    ) -> Iterator[np.ndarray | InputError]:
        session = self.session
        with ThreadPoolExecutor(session.threads, thread_name_prefix="jinaclip-image") as pool:
            ahead: deque[Future[np.ndarray]] = deque()

            def runs() -> Iterator[Callable[[], list[np.ndarray | InputError]]]:
                while True:
                    wanted = batch_size * session.concurrency + session.threads - len(ahead)
                    ahead.extend(pool.submit(read, image) for image in islice(images, wanted))
                    batch = [ahead.popleft() for _ in range(min(batch_size, len(ahead)))]
                    if not batch:
                        return
                    yield partial(self._run_good, [_result(future) for future in batch])

            try:
                for vectors in _in_flight(runs(), session.concurrency):
                    yield from vectors
            finally:
                for future in ahead:
                    future.cancel()

    def _run_good(self, pixels: Sequence[np.ndarray | InputError]) -> list[np.ndarray | InputError]:
        """Vectors of the images that could be read; the errors of the others in place."""
        good = [p for p in pixels if not isinstance(p, InputError)]
        vectors = iter(self.run(good))
        return [p if isinstance(p, InputError) else next(vectors) for p in pixels]


Encoder = TextEncoder | ImageEncoder
ENCODERS: dict[str, type[TextEncoder] | type[ImageEncoder]] = {"text": TextEncoder, "image": ImageEncoder}


def _in_flight(runs: Iterable[Callable[[], T]], concurrency: int) -> Iterator[T]:
    """The results of runs, in order, with so many asked for at the same time; one at a time, in this thread."""
    if concurrency > 1:
        runs = iter(runs)
        first = list(islice(runs, 2))
        runs = chain(first, runs)
        if len(first) < 2:  # threads for a single run would only cost time
            concurrency = 1
    if concurrency == 1:
        for run in runs:
            yield run()
        return
    with ThreadPoolExecutor(concurrency, thread_name_prefix="jinaclip-run") as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for run in runs:
                ahead.append(pool.submit(run))
                if len(ahead) > concurrency:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _result(future: Future[np.ndarray]) -> np.ndarray | InputError:
    try:
        return future.result()
    except InputError as error:
        return error


def _check_texts(rows: Sequence[Any]) -> None:
    for index, row in enumerate(rows):
        if not isinstance(row, str):
            raise InputError(f"text {index} is a {type(row).__name__}, expected str", index=index)


def _check_max_length(max_length: int, max_tokens: int, instruction_tokens: int) -> int:
    """The limit in tokens. The default is the family's 8192; a shorter model takes its own."""
    if type(max_length) is not int or max_length <= instruction_tokens or (max_length > max(max_tokens, 8192)):
        raise InputError(
            f"max_length is {max_length!r}, expected a whole number from {instruction_tokens + 1} "
            f"(<s>, </s> and the task's instruction count) to {max_tokens}"
        )
    return min(max_length, max_tokens)
