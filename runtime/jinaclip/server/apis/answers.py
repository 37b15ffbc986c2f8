"""Vectors, ranks and counts as they are answered."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jinaclip.embeddings import probabilities, truncate
from jinaclip.server.apis.requests import EmbeddingRequest, RankRequest
from jinaclip.server.errors import Problem

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


class HasVector(Protocol):
    """An item with its vector, raw float32 [D]."""

    @property
    def vector(self) -> np.ndarray: ...


def _vectors(items: Sequence[HasVector | Problem]) -> np.ndarray:
    return np.stack([item.vector for item in items if not isinstance(item, Problem)])


def embedding_data(request: EmbeddingRequest, items: Sequence[HasVector | Problem]) -> list[dict[str, Any]]:
    """What stands under "data" of an answer to POST /v1/embeddings, of items in their order."""
    finished = iter(truncate(_vectors(items), request.asked.dimensions, normalize=request.normalized))
    data: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        if isinstance(item, Problem):
            data.append({"object": "error", "index": index, "error": item.error()})
        else:
            value = embedding_of(next(finished), request.types, single=request.single_type)
            data.append({"object": "embedding", "index": index, "embedding": value})
    return data


def rank_data(
    request: RankRequest, texts: Sequence[HasVector | Problem], images: Sequence[HasVector | Problem],
    logit_scale: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """What stands under "data" of an answer to POST /v1/rank: for each query its candidates, the best first."""
    dim = request.asked.dimensions
    cosines = truncate(_vectors(texts), dim) @ truncate(_vectors(images), dim).T
    odds = probabilities(cosines, logit_scale, over=request.over)
    if request.over == "texts":  # an image asks, texts are its candidates
        cosines, odds = cosines.T, odds.T
    data = []
    for index, (row, likeness) in enumerate(zip(odds, cosines, strict=True)):
        best = np.argsort(-row, kind="stable")[: request.top_n]
        results = [{"index": int(i), "probability": float(row[i]), "cosine": float(likeness[i])} for i in best]
        data.append({"object": "ranking", "index": index, "results": results})
    return data
