"""Vectors and counts as the hosted API answers them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

TILE = 512  # pixels; an image counts IMAGE_TOKENS for each tile of the original, partial ones included
IMAGE_TOKENS = 4000


def encoded(vector: np.ndarray, kind: str) -> Any:
    """One vector [D] float32 as a JSON value.

    Args:
        kind: "float": a list of numbers. "base64": of little-endian float32. "ubinary": a bit for each number, 1 where
            it is above 0, the most significant first, eight to an unsigned byte. "binary": those bytes less 128.
    """
    if kind == "float":
        return vector
    if kind == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    packed = np.packbits(vector > 0)
    return packed.tolist() if kind == "ubinary" else (packed.astype(np.int16) - 128).tolist()


def embedding_of(vector: np.ndarray, types: Sequence[str], *, single: bool) -> Any:
    """What stands under "embedding": the value of one type, or an object of several."""
    return encoded(vector, types[0]) if single else {kind: encoded(vector, kind) for kind in types}


def image_tokens(width: int, height: int) -> int:
    """What an image counts as, by the size of the original: 512 × 512 is 4000, 720 × 720 is 16000."""
    return IMAGE_TOKENS * -(-width // TILE) * -(-height // TILE)
