"""Calls of the public API as users write them. Not run: mypy and pyright check the types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import numpy as np
from PIL import Image

import jinaclip
from jinaclip import (
    BackendError,
    BackendMissing,
    BundleError,
    ClipModel,
    EngineMismatch,
    InputError,
    JinaClipError,
    Overloaded,
    SelfTestFailed,
    share_threads,
)
from jinaclip.encoders import ImageEncoder, TextEncoder


def open_models(directory: Path) -> None:
    share_threads()
    share_threads(4)
    ClipModel(str(directory))
    ClipModel(directory, backend="onnxruntime", device="cuda:1", precision="fp16", threads=2)
    ClipModel(directory, precision={"text": "int8", "image": "fp32"}, towers=("text",), cache_dir=directory)
    ClipModel(directory, self_test="always").close()


def encode(model: ClipModel, picture: Image.Image, photos: list[Path]) -> None:
    assert_type(model.encode_text("a cat"), np.ndarray)
    assert_type(model.encode_text(["a cat", "un chat"], task="retrieval.query", truncate_dim=256), np.ndarray)
    model.encode_text(("a", "b"), max_length=512, batch_size=8, normalize_embeddings=False, show_progress_bar=True)
    assert_type(model.encode_image("photo.jpg"), np.ndarray)
    model.encode_image(b"...")
    model.encode_image(picture, exif_transpose=True)
    model.encode_image(np.zeros((4, 4, 3), np.uint8), resize_mode="squash")
    model.encode_image(photos, truncate_dim=64, batch_size=16, allow_urls=True)
    model.encode_image(path for path in photos)
    assert_type(model.similarity(np.zeros(4), np.zeros((2, 4))), np.ndarray)


def properties(model: ClipModel) -> None:
    assert_type(model.dims, tuple[int, ...])
    assert_type(model.max_tokens, int)
    assert_type(model.tasks, tuple[str, ...])
    assert_type(model.logit_scale, float)
    assert_type(model.provenance, str)
    assert_type(model.provenance_of(resize_mode="longest", exif_transpose=True), str)
    assert_type(model.info(), dict[str, Any])
    with model as opened:
        assert_type(opened, ClipModel)


def encoders(model: ClipModel, photos: list[Path]) -> None:
    text, image = assert_type(model.text_encoder, TextEncoder), assert_type(model.image_encoder, ImageEncoder)
    ids = assert_type(text.prepare(["a cat"], task=None, max_length=64), list[list[int]])
    assert_type(text.run(ids), np.ndarray)
    assert_type(text.run_all(ids, batch_size=4), Iterator[tuple[list[int], np.ndarray]])
    pixels = assert_type(image.prepare(photos[0]), np.ndarray)
    assert_type(image.run([pixels]), np.ndarray)
    assert_type(image.run_all(photos), Iterator[np.ndarray | InputError])
    assert_type(text.check(), dict[str, float | bool])


def errors() -> tuple[type[JinaClipError], ...]:
    assert_type(jinaclip.__version__, str)
    return BackendError, BackendMissing, BundleError, EngineMismatch, InputError, Overloaded, SelfTestFailed
