"""Response bodies: embeddings, rankings and token counts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from jinaclip.embeddings import rankings, truncate
from jinaclip.server.apis.items import Item
from jinaclip.server.apis.requests import EmbeddingRequest, RankRequest

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


def answer(model_name: str, items: Sequence[Item], data: list[dict[str, Any]]) -> dict[str, Any]:
    """The body of a response: `data` and the tokens of the request's items."""
    tokens = sum(item.tokens for item in items if item.problem is None)
    usage = {"total_tokens": tokens, "prompt_tokens": tokens}
    return {"model": model_name, "object": "list", "usage": usage, "data": data}


def embedding_data(request: EmbeddingRequest) -> list[dict[str, Any]]:
    """The value of "data" in a response to POST /v1/embeddings, in the order of the items."""
    vectors = iter(_vectors(request.input, request.dimensions, normalize=request.normalized is not False))
    types = request.types
    data: list[dict[str, Any]] = []
    for index, item in enumerate(request.input):
        if item.problem is not None:
            data.append({"object": "error", "index": index, "error": item.problem.error()})
        else:
            data.append({"object": "embedding", "index": index, "embedding": embedding_of(next(vectors), types)})
    return data


def rank_data(request: RankRequest, logit_scale: float) -> list[dict[str, Any]]:
    """The value of "data" in a response to POST /v1/rank: the candidates of each query, best first."""
    cosines = _vectors(request.texts, request.dimensions) @ _vectors(request.images, request.dimensions).T
    data = []
    for index, row in enumerate(rankings(cosines, logit_scale, over=request.over, top=request.top_n)):
        results = [{"index": i, "probability": odds, "cosine": cosine} for i, odds, cosine in row]
        data.append({"object": "ranking", "index": index, "results": results})
    return data


def _vectors(items: Sequence[Item], dimensions: int, *, normalize: bool = True) -> np.ndarray:
    return truncate(np.stack([item.vector for item in items if item.problem is None]), dimensions, normalize=normalize)
