"""ClipModel: texts and images to vectors of one space, from a bundle, without torch."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar, cast

import numpy as np
from PIL import Image

from jinaclip.backends.base import Session
from jinaclip.backends.cost import RELEASE_BYTES, is_tiled, predicted_bytes, require_memory
from jinaclip.backends.selection import asked_precision, choose_place, on_cpu, resolve_precision
from jinaclip.backends.self_test import run_self_test
from jinaclip.bundle.manifest import TOWERS, Bundle
from jinaclip.embeddings import check_dim, truncate
from jinaclip.errors import BackendError, InputError, SelfTestFailed
from jinaclip.packing import pack_texts
from jinaclip.preprocessing.image import RESIZE_MODES, normalise, preprocess
from jinaclip.preprocessing.image_sources import ImageInput
from jinaclip.preprocessing.text import TextTokenizer, instruction_of
from jinaclip.terminal import Progress

logger = logging.getLogger("jinaclip")

T = TypeVar("T")
INTERRUPTIBLE_TOKENS = 256  # a run of more tokens takes long enough for Ctrl-C to matter


class ClipModel:
    """A bundle that is ready to encode. Safe to use from several threads at once.

    Args:
        bundle: directory made by `jinaclip export`.
        backend: "auto" or one of BACKENDS. Auto takes engines that were built for the GPU here, else ONNX Runtime.
        device: "auto", "cpu", "cuda" or "cuda:N". Auto takes a GPU where there is one that can be used.
        precision: "auto", "fp32", "fp16", "int8", or a dict of them by tower. What is asked for is given or
            refused; auto takes the fastest that `jinaclip certify` has passed on such a machine, else fp32,
            and `info()` tells which and why.
        threads: cores for one call; None takes what affinity and the cgroup's quota allow.
        towers: which to load; by default those that the bundle has.
        cache_dir: where notes go that would lie beside a bundle that is read-only.
        self_test: "auto" remembers that the image tower passed here; "always" runs it again.

    Raises:
        BundleError: the bundle is damaged, too new, or lacks a tower or precision that was asked for.
        BackendMissing: the backend or device is not there.
        SelfTestFailed: it is there, and returns wrong vectors.

    After a fork a model refuses to work in the child (open it there); a pickled one opens its bundle again.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        backend: str = "auto",
        device: str = "auto",
        precision: str | Mapping[str, str] = "auto",
        threads: int | None = None,
        towers: Sequence[str] = TOWERS,
        cache_dir: str | os.PathLike[str] | None = None,
        self_test: str = "auto",
    ) -> None:
        self._reopen = partial(
            ClipModel, os.path.abspath(bundle), backend=backend, device=device, precision=precision,
            threads=threads, towers=tuple(towers), cache_dir=cache_dir, self_test=self_test,
        )  # fmt: skip
        _check_choice("self_test", self_test, ("auto", "always"))
        if threads is not None and (type(threads) is not int or threads < 1):
            raise InputError(f"threads is {threads!r}, expected None or a whole number from 1")
        if isinstance(towers, str) or not towers or not set(towers) <= set(TOWERS):
            raise InputError(f"towers is {towers!r}, expected some of {TOWERS}")
        self.bundle = Bundle(bundle, cache_dir)
        if tuple(towers) == TOWERS:
            towers = [tower for tower in TOWERS if tower in self.bundle.towers]
        asked = asked_precision(precision)
        self._place = choose_place(self.bundle, towers, backend=backend, device=device, precision=asked)
        self._precision, self._precision_reason = resolve_precision(asked, self.bundle, towers, self._place)
        self._tokenizer: TextTokenizer | None = None
        self._sessions: dict[str, Session] = {}
        self._self_test: dict[str, dict[str, float | bool]] = {}
        self._graph: dict[str, str] = {}
        if "text" in towers:
            self._tokenizer = TextTokenizer(
                self.bundle.tokenizer, vocab_size=self.bundle.vocab_size, special_ids=self.bundle.special_ids
            )
        try:
            self._open(towers, threads, always=self_test == "always")
        except BackendError as error:
            if device != "auto" or self._place.gpu is None or isinstance(error, SelfTestFailed):
                raise
            self._place = on_cpu(str(error))
            self._precision, self._precision_reason = resolve_precision(asked, self.bundle, towers, self._place)
            self._open(towers, threads, always=self_test == "always")

    def _open(self, towers: Sequence[str], threads: int | None, *, always: bool) -> None:
        """A session for each tower, held to the goldens; none is left open where one fails."""
        try:
            for tower in towers:
                opened = self._place.open(self.bundle, tower, self._precision[tower], threads=threads)
                self._sessions[tower], self._graph[tower] = opened
                self.check(tower, always=always)
        except BaseException:
            self.close()
            self._sessions.clear()
            raise

    def check(self, tower: str, *, always: bool = True) -> dict[str, float | bool]:
        """Hold a tower to the bundle's golden vectors, as opening does.

        Args:
            always: run it even if a pass is remembered beside the bundle.

        Returns:
            As `info()` tells: {"ratio": worst error ÷ distance to the nearest other golden, "remembered": bool}.

        Raises:
            SelfTestFailed: it returns wrong vectors. BackendError: it returns none.
        """
        self._self_test[tower] = run_self_test(
            self.bundle, tower, self._precision[tower], self.session(tower),
            tokenizer=self._tokenizer if tower == "text" else None, always=always,
        )  # fmt: skip
        return self._self_test[tower]

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        task: str | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
        batch_size: int | None = None,
        max_length: int = 8192,
        show_progress_bar: bool = False,
    ) -> np.ndarray:
        """Vectors of texts.

        Args:
            texts: one str, or N of them.
            task: None, or one of `tasks`: its instruction is put before every text.
            truncate_dim: one of `dims`; None keeps all.
            normalize_embeddings: divide each vector by its norm, after truncation.
            batch_size: most texts in a run; None lets memory and padding decide.
            max_length: tokens kept of each text, `<s>`, `</s>` and the instruction included, at most
                `max_tokens`. A cut text is warned of. (The publisher's own encode_text cuts at 512.)
            show_progress_bar: on stderr, if that is a terminal.

        Returns:
            float32 [D] for one str, [N, D] for a sequence, in the caller's order.

        Raises:
            InputError: an argument or a text cannot be used; names which.
        """
        dim = check_dim(truncate_dim, self.dims)
        session, tokenizer = self.session("text"), cast(TextTokenizer, self._tokenizer)
        _check_batch_size(batch_size)
        instruction = instruction_of(task, self.bundle.tasks, self.bundle.default_task)
        single = isinstance(texts, str)
        rows = [texts] if isinstance(texts, str) else _as_list(texts, "texts")
        limit = _check_max_length(max_length, self.max_tokens, len(tokenizer.encode([instruction])[0]))
        _check_texts(rows)
        ids = tokenizer.truncated(tokenizer.encode([instruction + row for row in rows]), limit)
        result = np.empty((len(rows), dim), np.float32)
        tower = self.bundle.tower("text")
        progress = Progress("texts", len(rows), shown=show_progress_bar)
        batches = pack_texts([len(row) for row in ids], tower, batch_size=batch_size, cost=session.cost)
        runs = (partial(self.embed_ids, [ids[i] for i in batch]) for batch in batches)
        for batch, vectors in zip(batches, _in_flight(runs, session.concurrency), strict=True):
            result[batch] = truncate(vectors, dim, normalize=normalize_embeddings)
            progress.advance(len(batch))
        return result[0] if single else result

    def token_ids(self, texts: Sequence[str], *, task: str | None = None) -> list[list[int]]:
        """Ids of texts at their full length, special tokens and the task's instruction included.

        Raises:
            InputError: a text or the task cannot be used.
        """
        self.session("text")
        instruction = instruction_of(task, self.bundle.tasks, self.bundle.default_task)
        _check_texts(texts)
        return cast(TextTokenizer, self._tokenizer).encode([instruction + text for text in texts])

    def embed_ids(self, rows: Sequence[list[int]]) -> np.ndarray:
        """Raw vectors [N, D] of texts that run together, from their ids.

        Raises:
            InputError: a text has no token or more than `max_tokens`, or an id is not one of the model's.
        """
        session = self.session("text")
        if not rows:
            return np.empty((0, self.dims[-1]), np.float32)
        tower, tokenizer = self.bundle.tower("text"), cast(TextTokenizer, self._tokenizer)
        for index, row in enumerate(rows):
            if not 0 < len(row) <= self.max_tokens:
                raise InputError(f"text {index} has {len(row)} tokens, expected 1 to {self.max_tokens}", index=index)
        padded = tokenizer.padded(rows)
        if padded.min() < 0 or padded.max() >= self.bundle.vocab_size:  # a GPU's kernels do not check
            index = int(((padded < 0) | (padded >= self.bundle.vocab_size)).any(1).argmax())
            raise InputError(f"text {index} has ids that are not from 0 to {self.bundle.vocab_size - 1}", index=index)
        release = False
        if session.cost.writes_scores:
            tiled = is_tiled(padded, tokenizer.pad, session.tiled_above)
            require_memory(len(rows), padded.shape[1], tower, tiled=tiled)
            release = predicted_bytes(len(rows), padded.shape[1], tower, tiled=tiled) > RELEASE_BYTES
        interruptible, output = padded.size >= INTERRUPTIBLE_TOKENS, "text_embeddings"
        return session.run(
            {tower.input_name: padded}, outputs=[output], interruptible=interruptible, release_memory=release
        )[output]

    def encode_image(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        allow_urls: bool = False,
        resize_mode: str | None = None,
        exif_transpose: bool = False,
    ) -> np.ndarray:
        """Vectors of images; jinaclip.preprocessing.image tells what every kind of picture becomes.

        Args:
            images: one image, or N of them: path, data: URI, bytes, binary file, PIL image or uint8 array
                [height, width, 3].
            truncate_dim, normalize_embeddings, show_progress_bar: as in `encode_text`.
            batch_size: images in a run; None takes what is quickest, on a CPU one.
            allow_urls: fetch http:// and https:// addresses.
            resize_mode: "shortest", "longest" or "squash"; None takes the bundle's.
            exif_transpose: turn a photo as its EXIF orientation says; the publisher's code does not.

        Returns:
            float32 [D] for one image, [N, D] for several, in the caller's order.

        Raises:
            InputError: an argument or an image cannot be used; `index` tells which.
        """
        dim = check_dim(truncate_dim, self.dims)
        single = _is_one_image(images)
        rows = [cast(ImageInput, images)] if single else _as_list(cast(Iterable[ImageInput], images), "images")
        result = np.empty((len(rows), dim), np.float32)
        progress = Progress("images", len(rows), shown=show_progress_bar)
        vectors = self.embed_images(
            rows, batch_size=batch_size, allow_urls=allow_urls, resize_mode=resize_mode, exif_transpose=exif_transpose
        )
        for index, vector in enumerate(vectors):
            if isinstance(vector, InputError):
                where = "" if single else f"image {index}: "
                raise InputError(f"{where}{vector}", index=None if single else index) from vector
            result[index] = truncate(vector[None], dim, normalize=normalize_embeddings)[0]
            progress.advance()
        return result[0] if single else result

    def embed_images(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int | None = None,
        allow_urls: bool = False,
        resize_mode: str | None = None,
        exif_transpose: bool = False,
    ) -> Iterator[np.ndarray | InputError]:
        """Raw vectors [D] of any number of images, in order, as they are ready; for one that cannot be used,
        its InputError in place. Pictures are read and resized in other threads while the model runs.
        """
        session = self.session("image")
        _check_batch_size(batch_size)
        if resize_mode is not None:
            _check_choice("resize_mode", resize_mode, RESIZE_MODES)
        return self._embed_images(
            session, iter(images), batch_size or session.cost.images,
            partial(
                preprocess, preprocessing=self.bundle.preprocessing, resize_mode=resize_mode,
                exif_transpose=exif_transpose, allow_urls=allow_urls,
            ),
        )  # fmt: skip

    def _embed_images(
        self, session: Session, images: Iterator[ImageInput], batch_size: int, read: Any
    ) -> Iterator[np.ndarray | InputError]:
        with ThreadPoolExecutor(session.threads, thread_name_prefix="jinaclip-image") as pool:
            ahead: deque[Future[np.ndarray]] = deque()

            def runs() -> Iterator[Callable[[], list[np.ndarray | InputError]]]:
                while True:
                    wanted = batch_size * session.concurrency + session.threads - len(ahead)
                    ahead.extend(pool.submit(read, image) for image in islice(images, wanted))
                    batch = [ahead.popleft() for _ in range(min(batch_size, len(ahead)))]
                    if not batch:
                        return
                    yield partial(self._run_images, [_result(future) for future in batch])

            try:
                for vectors in _in_flight(runs(), session.concurrency):
                    yield from vectors
            finally:
                for future in ahead:
                    future.cancel()

    def embed_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Raw vectors [N, D] of images that run together, each uint8 [size, size, 3] as `preprocess` makes it.

        Raises:
            InputError: an array has another dtype or shape.
        """
        session = self.session("image")
        if not len(pixels):
            return np.empty((0, self.dims[-1]), np.float32)
        tower, size = self.bundle.tower("image"), self.bundle.preprocessing.size
        for index, array in enumerate(pixels):
            if array.dtype != np.uint8 or array.shape != (size, size, 3):
                raise InputError(
                    f"image {index} is {array.dtype} {list(array.shape)}, expected uint8 {[size, size, 3]}", index=index
                )
        batch = np.stack(pixels)  # [B, size, size, 3]
        if tower.input_dtype == "float32":
            batch = normalise(batch, self.bundle.preprocessing)
        output = "image_embeddings"
        return session.run({tower.input_name: batch}, outputs=[output], interruptible=True)[output]

    def _run_images(self, pixels: Sequence[np.ndarray | InputError]) -> list[np.ndarray | InputError]:
        good = [p for p in pixels if not isinstance(p, InputError)]
        vectors = iter(self.embed_pixels(good) if good else ())
        return [p if isinstance(p, InputError) else next(vectors) for p in pixels]

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine of every vector of `a` [N, D] with every one of `b` [M, D]: float32 [N, M].

        A single vector [D] loses its axis: two of them give one number.
        """
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if a.ndim not in (1, 2) or b.ndim not in (1, 2) or a.shape[-1] != b.shape[-1]:
            raise InputError(
                f"similarity of shapes {list(a.shape)} and {list(b.shape)}; expected [N, D] and [M, D] with equal D"
            )
        a, b = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b))
        return cast(np.ndarray, a @ b.T)

    @property
    def dims(self) -> tuple[int, ...]:
        """Lengths a vector can be cut to; the last is the full one."""
        return self.bundle.dims

    @property
    def max_tokens(self) -> int:
        """Longest text, `<s>` and `</s>` included."""
        return self.bundle.max_tokens

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks with an instruction; None is always possible."""
        return tuple(self.bundle.tasks)

    @property
    def logit_scale(self) -> float:
        """The checkpoint's parameter: logits are text · imageᵀ · exp(logit_scale)."""
        return self.bundle.logit_scale

    @property
    def provenance(self) -> str:
        """Id of weights, preprocessing and precision class: only vectors of one id belong in one index."""
        return self.provenance_of()

    def provenance_of(self, *, resize_mode: str | None = None, exif_transpose: bool = False) -> str:
        """The id of vectors that were made with these arguments of `encode_image`."""
        return self.bundle.provenance(self._precision, resize_mode=resize_mode, exif_transpose=exif_transpose)

    def info(self) -> dict[str, Any]:
        """What was loaded and what "auto" chose; JSON values only."""
        return {
            "bundle": str(self.bundle.directory),
            "model": self.bundle.model,
            "provenance": self.provenance,
            "dims": list(self.dims),
            "max_tokens": self.max_tokens,
            "tasks": list(self.tasks),
            "logit_scale": self.logit_scale,
            "backend_reason": self._place.reason,
            "towers": {
                tower: {
                    "precision": self._precision[tower],
                    "precision_reason": self._precision_reason[tower],
                    **session.describe(),
                    "graph_reason": self._graph[tower],
                    "self_test": self._self_test[tower],
                }
                for tower, session in self._sessions.items()
            },
        }

    def close(self) -> None:
        """Free the graphs; encoding afterwards is an error. Closing twice is not."""
        for session in self._sessions.values():
            session.close()

    def __enter__(self) -> ClipModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reopened(self, *, threads: int | None) -> ClipModel:
        """The same towers of the same bundle once more, with other threads, in the precision that was chosen here."""
        return self._reopen(threads=threads, precision=dict(self._precision))

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, ()

    def session(self, tower: str) -> Session:
        """What runs a tower.

        Raises:
            InputError: it is not there, or was not loaded.
        """
        if tower in self._sessions:
            return self._sessions[tower]
        if tower not in self.bundle.towers:
            raise InputError(
                f"this bundle has no {tower} tower (it has: {', '.join(self.bundle.towers)}), so it cannot encode "
                f"{tower}s; export it with --towers text,image"
            )
        raise InputError(f"the {tower} tower was not loaded; open ClipModel with towers=('text', 'image')")


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


def _is_one_image(images: object) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    kinds = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
    return isinstance(images, kinds) or hasattr(images, "read")


def _as_list(items: Iterable[Any], what: str) -> list[Any]:
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise InputError(f"{what} is a {type(items).__name__}, expected one or a list of them")
    return list(items)


def _check_texts(rows: Sequence[object]) -> None:
    for index, row in enumerate(rows):
        if not isinstance(row, str):
            raise InputError(f"text {index} is a {type(row).__name__}, expected str", index=index)


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise InputError(f"batch_size is {batch_size!r}, expected None or a whole number from 1")


def _check_max_length(max_length: int, max_tokens: int, instruction_tokens: int) -> int:
    """The limit in tokens. The default is the family's 8192; a shorter model takes its own."""
    if type(max_length) is not int or max_length <= instruction_tokens or (max_length > max(max_tokens, 8192)):
        raise InputError(
            f"max_length is {max_length!r}, expected a whole number from {instruction_tokens + 1} "
            f"(<s>, </s> and the task's instruction count) to {max_tokens}"
        )
    return min(max_length, max_tokens)
