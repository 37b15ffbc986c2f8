"""ClipModel: texts and images to vectors of one space, from a bundle, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
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
from jinaclip.terminal import Progress


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
        """An encoder for each tower that passed its self-test; none is left open where one fails."""
        try:
            for tower in towers:
                precision = self._precision[tower]
                session, self._graph[tower] = self._backend.open(self.bundle, tower, precision, threads=threads)
                try:
                    self.encoders[tower] = ENCODERS[tower](self.bundle, precision, session)
                except BaseException:
                    session.close()
                    raise
                self.encoders[tower].check(always=always)
        except BaseException:
            self.close()
            self.encoders.clear()
            raise

    @property
    def text_encoder(self) -> TextEncoder:
        """The text tower, for hosts that batch by themselves.

        Raises:
            InputError: the bundle has none, or it was not loaded.
        """
        return cast(TextEncoder, self._encoder("text"))

    @property
    def image_encoder(self) -> ImageEncoder:
        """The image tower, for hosts that batch by themselves.

        Raises:
            InputError: the bundle has none, or it was not loaded.
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
        encoder = self.text_encoder
        _check_batch_size(batch_size)
        single = isinstance(texts, str)
        rows = [texts] if isinstance(texts, str) else _as_list(texts, "texts")
        ids = encoder.prepare(rows, task=task, max_length=max_length)
        result = np.empty((len(rows), dim), np.float32)
        progress = Progress("texts", len(rows), shown=show_progress_bar)
        for batch, vectors in encoder.run_all(ids, batch_size=batch_size):
            result[batch] = truncate(vectors, dim, normalize=normalize_embeddings)
            progress.advance(len(batch))
        return result[0] if single else result

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
        encoder = self.image_encoder
        _check_batch_size(batch_size)
        progress = Progress("images", len(rows), shown=show_progress_bar)
        vectors = encoder.run_all(
            rows, batch_size=batch_size, resize_mode=resize_mode, exif_transpose=exif_transpose, allow_urls=allow_urls
        )
        for index, vector in enumerate(vectors):
            if isinstance(vector, InputError):
                where = "" if single else f"image {index}: "
                raise InputError(f"{where}{vector}", index=None if single else index) from vector
            result[index] = truncate(vector[None], dim, normalize=normalize_embeddings)[0]
            progress.advance()
        return result[0] if single else result

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
        """Free the graphs; encoding afterwards is an error. Closing twice is not."""
        for encoder in self.encoders.values():
            encoder.session.close()

    def __enter__(self) -> ClipModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reopened(self, *, threads: int | None) -> ClipModel:
        """The same towers of the same bundle once more, with other threads, in the precision that was chosen here."""
        return self._reopen(threads=threads, precision=dict(self._precision))

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, ()

    def _encoder(self, tower: str) -> TextEncoder | ImageEncoder:
        if tower in self.encoders:
            return self.encoders[tower]
        if tower not in self.bundle.towers:
            raise InputError(
                f"this bundle has no {tower} tower (it has: {', '.join(self.bundle.towers)}), so it cannot encode "
                f"{tower}s; export it with --towers text,image"
            )
        raise InputError(f"the {tower} tower was not loaded; open ClipModel with towers=('text', 'image')")


def _is_one_image(images: object) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    kinds = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
    return isinstance(images, kinds) or hasattr(images, "read")


def _as_list(items: Iterable[Any], what: str) -> list[Any]:
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise InputError(f"{what} is a {type(items).__name__}, expected one or a list of them")
    return list(items)


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise InputError(f"batch_size is {batch_size!r}, expected None or a whole number from 1")
