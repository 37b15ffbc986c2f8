"""Response bodies: embeddings, rankings and token counts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jinaclip.embeddings import probabilities, truncate
from jinaclip.server.apis.requests import EmbeddingRequest, RankRequest
from jinaclip.server.errors import Problem

TILE = 512  # pixels; an image counts as IMAGE_TOKENS for each tile of the original, including partial tiles
IMAGE_TOKENS = 4000


def encoded(vector: np.ndarray, kind: str) -> Any:
    """Encode an embedding as a JSON value.

    Args:
        vector: the embedding, float32 [D].
        kind: the embedding type.
            "float": a list of numbers.
            "base64": base64 of little-endian float32.
            "ubinary": one bit per dimension, 1 for values above 0, packed into unsigned bytes, most significant bit
            first.
            "binary": the same bytes minus 128.
    """
    if kind == "float":
        return vector
    if kind == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    packed = np.packbits(vector > 0)
    return packed.tolist() if kind == "ubinary" else (packed.astype(np.int16) - 128).tolist()


def embedding_of(vector: np.ndarray, types: Sequence[str]) -> Any:
    """The value of "embedding" in a response: one encoded vector, or for several types an object with one per type."""
    return encoded(vector, types[0]) if len(types) == 1 else {kind: encoded(vector, kind) for kind in types}


def image_tokens(width: int, height: int) -> int:
    """The token count of an image, from its original size: 4000 for 512 × 512 pixels, 16000 for 720 × 720."""
    return IMAGE_TOKENS * -(-width // TILE) * -(-height // TILE)


class HasVector(Protocol):
    """An item with its unnormalized embedding, float32 [D]."""

    @property
    def vector(self) -> np.ndarray: ...


def _vectors(items: Sequence[HasVector | Problem]) -> np.ndarray:
    return np.stack([item.vector for item in items if not isinstance(item, Problem)])


def embedding_data(request: EmbeddingRequest, items: Sequence[HasVector | Problem]) -> list[dict[str, Any]]:
    """The value of "data" in a response to POST /v1/embeddings, in the order of the items."""
    finished = iter(truncate(_vectors(items), request.dimensions, normalize=request.normalized is not False))
    data: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        if isinstance(item, Problem):
            data.append({"object": "error", "index": index, "error": item.error()})
        else:
            value = embedding_of(next(finished), request.types)
            data.append({"object": "embedding", "index": index, "embedding": value})
    return data


def rank_data(
    request: RankRequest, texts: Sequence[HasVector | Problem], images: Sequence[HasVector | Problem],
    logit_scale: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """The value of "data" in a response to POST /v1/rank: the candidates of each query, best first."""
    dim = request.dimensions
    cosines = truncate(_vectors(texts), dim) @ truncate(_vectors(images), dim).T
    odds = probabilities(cosines, logit_scale, over=request.over)
    if request.over == "texts":  # images are the queries, texts the candidates
        cosines, odds = cosines.T, odds.T
    data = []
    for index, (row, likeness) in enumerate(zip(odds, cosines, strict=True)):
        best = np.argsort(-row, kind="stable")[: request.top_n]
        results = [{"index": int(i), "probability": float(row[i]), "cosine": float(likeness[i])} for i in best]
        data.append({"object": "ranking", "index": index, "results": results})
    return data
