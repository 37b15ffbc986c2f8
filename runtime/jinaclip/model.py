"""ClipModel: encodes texts and images as vectors of one embedding space, from a bundle and without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import numpy as np
from PIL import Image

from jinaclip.backends.selection import asked_precision, choose_backend, on_cpu, resolve_precision
from jinaclip.bundle.manifest import TOWERS, Bundle
from jinaclip.embeddings import check_dim, truncate
from jinaclip.encoders import ENCODERS, ImageEncoder, TextEncoder
from jinaclip.errors import BackendError, InputError, SelfTestFailed
from jinaclip.preprocessing.image_sources import ImageInput
from jinaclip.terminal import progress


class ClipModel:
    """An opened bundle, ready to encode. Safe to use from several threads at once.

    Args:
        bundle: directory made by `jinaclip export`.
        backend: "auto" or one of BACKENDS. "auto" uses engines built for this machine's GPU if there are any, and
            ONNX Runtime otherwise.
        device: "auto", "cpu", "cuda" or "cuda:N". "auto" uses a GPU if one is available, and the CPU otherwise.
        precision: "auto", "fp32", "fp16", "int8", or a dict with one of them per tower. If an explicit precision
            cannot be used, an error is raised. "auto" uses the fastest precision with a passing certificate
            (`jinaclip certify`) for this kind of machine, and fp32 otherwise; `info()` returns the choice and
            the reason.
        threads: cores for one call. None uses all that the CPU affinity and the cgroup's quota allow.
        towers: towers to load. The default loads every tower that the bundle has.
        cache_dir: directory for self-test results, certificates and engines when the bundle is read-only.
        self_test: "auto" skips the image tower's self-test if it already passed on this machine; "always" runs it.

    Raises:
        BundleError: the bundle is damaged, too new, or lacks a requested tower or precision.
        BackendMissing: the backend or device is not available.
        EngineMismatch: the engines in the bundle were built for another GPU or library version.
        SelfTestFailed: the backend returns wrong vectors.

    A model cannot be used in a forked child process; open a new model in the child. Unpickling a model opens its
    bundle again.

    Examples:
        >>> with ClipModel("bundle/", threads=2) as model:
        ...     print(model.encode_text("a cup of coffee", truncate_dim=64).shape)
        (64,)
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
        there = partial(ClipModel, os.path.abspath(bundle), backend=backend, device=device, cache_dir=cache_dir)
        self._reopen = partial(there, precision=precision, threads=threads, towers=tuple(towers), self_test=self_test)
        if self_test not in ("auto", "always"):
            raise InputError(f"self_test is {self_test!r}, expected one of auto, always")
        check_count("threads", threads)
        if isinstance(towers, str) or not towers or not set(towers) <= set(TOWERS):
            raise InputError(f"towers is {towers!r}, expected some of {TOWERS}")
        self.bundle = Bundle(bundle, cache_dir)
        if tuple(towers) == TOWERS:
            towers = [tower for tower in TOWERS if tower in self.bundle.towers]
        asked = asked_precision(precision)
        self._backend = choose_backend(self.bundle, towers, backend=backend, device=device, precision=asked)
        self._precision, self._precision_reason = resolve_precision(asked, self.bundle, towers, self._backend)
        self.encoders: dict[str, TextEncoder | ImageEncoder] = {}
        self._graph: dict[str, str] = {}
        try:
            self._open(towers, threads, always=self_test == "always")
        except BackendError as error:
            if device != "auto" or self._backend.gpu is None or isinstance(error, SelfTestFailed):
                raise
            self._backend = on_cpu(str(error))
            self._precision, self._precision_reason = resolve_precision(asked, self.bundle, towers, self._backend)
            self._open(towers, threads, always=self_test == "always")

    def _open(self, towers: Sequence[str], threads: int | None, *, always: bool) -> None:
        """Open an encoder for each tower and run its self-test. If one fails, all are closed."""
        with ExitStack() as stack:
            for tower in towers:
                precision = self._precision[tower]
                session, self._graph[tower] = self._backend.open(self.bundle, tower, precision, threads=threads)
                stack.callback(session.close)
                self.encoders[tower] = ENCODERS[tower](self.bundle, precision, session)
                self.encoders[tower].check(always=always)
            stack.pop_all()

    @property
    def text_encoder(self) -> TextEncoder:
        """The text tower, for applications that form batches themselves.

        Raises:
            InputError: the bundle has no text tower, or it was not loaded.

        Examples:
            >>> model.text_encoder.precision
            'fp32'
        """
        return cast(TextEncoder, self._encoder("text"))

    @property
    def image_encoder(self) -> ImageEncoder:
        """The image tower, for applications that form batches themselves.

        Raises:
            InputError: the bundle has no image tower, or it was not loaded.

        Examples:
            >>> model.image_encoder.precision
            'fp32'
        """
        return cast(ImageEncoder, self._encoder("image"))

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
        """Encode texts.

        Args:
            texts: one str, or a sequence of N.
            task: one of `tasks`, whose instruction is put before every text. None uses the bundle's default task, if it
                has one.
            truncate_dim: length of the returned vectors, one of `dims`. None returns full-length vectors.
            normalize_embeddings: divide each vector by its norm, after truncation.
            batch_size: the largest number of texts in a batch. None chooses it from the text lengths and the memory.
            max_length: number of tokens kept of each text, at most `max_tokens`. `<s>`, `</s>` and the instruction
                count. Truncated texts are reported in a warning. (The publisher's own encode_text truncates to 512.)
            show_progress_bar: show progress on stderr, if it is a terminal.

        Returns:
            float32 [D] for one str, [N, D] for a sequence, in the order of the input.

        Raises:
            InputError: an argument or a text is invalid; the message names it.
            BackendError: inference failed, or the model is closed.

        Examples:
            >>> model.encode_text(["a cup of coffee", "une tasse de café"], truncate_dim=64).shape
            (2, 64)
        """
        dim = check_dim(truncate_dim, self.dims)
        check_count("batch_size", batch_size)
        rows = [texts] if isinstance(texts, str) else _as_list(texts, "texts")
        ids = self.text_encoder.prepare(rows, task=task, max_length=max_length)
        result = np.empty((len(rows), dim), np.float32)
        advance = progress("texts", len(rows), shown=show_progress_bar)
        for batch, vectors in self.text_encoder.run_all(ids, batch_size=batch_size):
            result[batch] = truncate(vectors, dim, normalize=normalize_embeddings)
            advance(len(batch))
        return result[0] if isinstance(texts, str) else result

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
        """Encode images. jinaclip.preprocessing.image describes how each image format and mode is converted.

        Args:
            images: one image, or an iterable of N. An image is a path, data: URI, bytes, binary file, PIL image or
                uint8 array [height, width, 3].
            truncate_dim, normalize_embeddings, show_progress_bar: as in `encode_text`.
            batch_size: number of images in a batch. None uses the fastest size for the device (1 on a CPU).
            allow_urls: fetch http:// and https:// URLs, from any address that this machine can reach.
            resize_mode: "shortest", "longest" or "squash". None uses the bundle's mode.
            exif_transpose: rotate images according to their EXIF orientation. The publisher's code does not.

        Returns:
            float32 [D] for one image, [N, D] for several, in the order of the input.

        Raises:
            InputError: an argument or an image is invalid; `index` is the position of the image.
            BackendError: inference failed, or the model is closed.

        Examples:
            >>> model.encode_image(["coffee.jpg", "cat.jpg"], truncate_dim=64).shape
            (2, 64)
        """
        dim = check_dim(truncate_dim, self.dims)
        check_count("batch_size", batch_size)
        single = _is_one_image(images)
        rows: list[Any] = [images] if single else _as_list(images, "images")
        result = np.empty((len(rows), dim), np.float32)
        advance = progress("images", len(rows), shown=show_progress_bar)
        vectors = self.image_encoder.run_all(
            rows, batch_size=batch_size, resize_mode=resize_mode, exif_transpose=exif_transpose, allow_urls=allow_urls
        )
        for index, vector in enumerate(vectors):
            if isinstance(vector, InputError):
                where = "" if single else f"image {index}: "
                raise InputError(f"{where}{vector}", index=None if single else index) from vector
            result[index] = truncate(vector[None], dim, normalize=normalize_embeddings)[0]
            advance(1)
        return result[0] if single else result

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarity of every vector of `a` [N, D] with every vector of `b` [M, D].

        Returns:
            float32 [N, M], from -1 to 1. If `a` or `b` is a single vector [D], the result does not have its axis.

        Raises:
            InputError: the shapes do not match.

        Examples:
            >>> ClipModel.similarity(np.array([1.0, 0.0]), np.array([[2.0, 0.0], [0.0, 1.0]]))
            array([1., 0.], dtype=float32)
        """
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if a.ndim not in (1, 2) or b.ndim not in (1, 2) or a.shape[-1] != b.shape[-1]:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            raise InputError(f"similarity of shapes {shapes}; expected [N, D] and [M, D] with equal D")
        a, b = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b))
        return cast(np.ndarray, a @ b.T)

    @property
    def dims(self) -> tuple[int, ...]:
        """Lengths that vectors can be truncated to, in numbers of dimensions, ascending. The last is the full length.

        Examples:
            >>> model.dims
            (32, 64, 128...)
        """
        return self.bundle.dims

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens in a text, `<s>` and `</s>` included.

        Examples:
            >>> model.max_tokens
            8192
        """
        return self.bundle.max_tokens

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have an instruction. `task=None` is always accepted.

        Examples:
            >>> model.tasks
            ('retrieval.query',)
        """
        return tuple(self.bundle.tasks)

    @property
    def logit_scale(self) -> float:
        """The checkpoint's logit scale: logits are text · imageᵀ · exp(logit_scale).

        Examples:
            >>> logits = np.array([0.12, 0.31]) * np.exp(model.logit_scale)  # of two cosines
        """
        return self.bundle.logit_scale

    @property
    def provenance(self) -> str:
        """The id of the weights, preprocessing and precision class. Do not mix vectors with different ids in an index.

        Examples:
            >>> model.provenance
            'jc1-...'
        """
        return self.provenance_of()

    def provenance_of(self, *, resize_mode: str | None = None, exif_transpose: bool = False) -> str:
        """The provenance id of vectors from `encode_image` with this `resize_mode` and `exif_transpose`.

        Examples:
            >>> model.provenance_of(exif_transpose=True) == model.provenance
            False
        """
        return self.bundle.provenance(self._precision, resize_mode=resize_mode, exif_transpose=exif_transpose)

    def info(self) -> dict[str, Any]:
        """Describe the loaded model and the choices of "auto", in JSON types. Keys that end in "reason" give reasons.

        Examples:
            >>> model.info()["towers"]["text"]["backend"]
            'onnxruntime'
        """
        return {
            "bundle": str(self.bundle.directory),
            "model": self.bundle.model,
            "provenance": self.provenance,
            "dims": list(self.dims),
            "max_tokens": self.max_tokens,
            "tasks": list(self.tasks),
            "logit_scale": self.logit_scale,
            "backend_reason": self._backend.reason,
            "towers": {
                tower: {
                    "precision": self._precision[tower],
                    "precision_reason": self._precision_reason[tower],
                    **encoder.session.describe(),
                    "graph_reason": self._graph[tower],
                    "self_test": encoder.self_test,
                }
                for tower, encoder in self.encoders.items()
            },
        }

    def close(self) -> None:
        """Free the graphs. Encoding afterwards raises a BackendError; closing again has no effect.

        Examples:
            >>> ClipModel("bundle/").close()
        """
        for encoder in self.encoders.values():
            encoder.session.close()

    def __enter__(self) -> ClipModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reopened(self, *, threads: int | None) -> ClipModel:
        """Open the same towers of the same bundle again, in the same precision. `threads` is as for `ClipModel`.

        Examples:
            >>> with model.reopened(threads=1) as other:
            ...     vector = other.encode_text("a cup of coffee")
        """
        return self._reopen(threads=threads, precision=dict(self._precision))

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, ()

    def _encoder(self, tower: str) -> TextEncoder | ImageEncoder:
        if tower in self.encoders:
            return self.encoders[tower]
        if tower not in self.bundle.towers:
            problem = f"this bundle has no {tower} tower (it has: {', '.join(self.bundle.towers)})"
            raise InputError(f"{problem} and cannot encode {tower}s; export it with --towers text,image")
        raise InputError(f"the {tower} tower was not loaded; open ClipModel with towers=('text', 'image')")


def _is_one_image(images: object) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    kinds = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
    return isinstance(images, kinds) or hasattr(images, "read")


def _as_list(items: object, what: str) -> list[Any]:
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise InputError(f"{what} is a {type(items).__name__}, expected one item or a list of items")
    return list(items)


def check_count(name: str, value: int | None) -> None:
    """Check an argument that is None or a whole number from 1.

    Raises:
        InputError: it is something else; the message contains its name.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(f"{name} is {value!r}, expected None or a whole number from 1")
