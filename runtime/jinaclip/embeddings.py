"""From a graph's raw vectors to what callers get: truncated, then normalised, as the publisher does (Matryoshka, arXiv
2205.13147); and cosines as probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jinaclip.errors import BackendError, InputError


def check_dim(dim: int | None, dims: Sequence[int]) -> int:
    """`dim` if the model was trained for it, the full width for None.

    Raises:
        InputError: another dim; the message lists the allowed ones.
    """
    if dim is None:
        return max(dims)
    if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or int(dim) not in dims:
        allowed = ", ".join(map(str, dims))
        raise InputError(f"truncate_dim {dim!r} is not one of this model's dims; expected one of {allowed}")
    return int(dim)


def truncate(raw: np.ndarray, dim: int, *, normalize: bool = True) -> np.ndarray:
    """First `dim` components of each row, as float32, with norm 1 unless `normalize` is False.

    Args:
        raw: embeddings [N, D] as the graph's raw output gives them.

    Raises:
        BackendError: a row holds NaN or infinity; it is never returned.
    """
    cut = np.ascontiguousarray(raw[:, :dim], dtype=np.float32)
    if not np.isfinite(cut).all():
        bad = np.flatnonzero(~np.isfinite(cut).all(axis=1))
        raise BackendError(
            f"the model returned NaN or infinity for {len(bad)} of {len(cut)} inputs; the vectors were discarded"
        )
    if not normalize:
        return cut
    norms: np.ndarray = np.linalg.norm(cut.astype(np.float64), axis=1, keepdims=True)
    unit: np.ndarray = (cut / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit


def probabilities(cosines: np.ndarray, logit_scale: float, *, over: str) -> np.ndarray:
    """Softmax of the model's logits: cosine × exp(logit_scale).

    Args:
        cosines: [texts, images].
        logit_scale: the checkpoint's parameter.
        over: "texts": each image's probabilities add up to 1; "images": each text's.

    Returns:
        float64 [texts, images].
    """
    logits = cosines.astype(np.float64) * np.exp(logit_scale)
    axis = 0 if over == "texts" else 1
    odds = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return np.asarray(odds / odds.sum(axis=axis, keepdims=True))
