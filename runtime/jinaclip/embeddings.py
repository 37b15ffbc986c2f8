"""Post-processing of raw vectors: truncation followed by normalisation, in the publisher's order (Matryoshka
embeddings, arXiv 2205.13147), and conversion of cosine similarities to probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jinaclip.errors import BackendError, InputError


def check_dim(dim: int | None, dims: Sequence[int]) -> int:
    """Check the length that vectors are to be truncated to.

    Args:
        dim: the requested length. None requests the full length.
        dims: the lengths that the model was trained for.

    Returns:
        The length.

    Raises:
        InputError: the length is not in `dims`; the message lists them.
    """
    if dim is None:
        return max(dims)
    if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or int(dim) not in dims:
        allowed = ", ".join(map(str, dims))
        raise InputError(f"truncate_dim {dim!r} is not one of this model's dims; expected one of {allowed}")
    return int(dim)


def truncate(raw: np.ndarray, dim: int, *, normalize: bool = True) -> np.ndarray:
    """Truncate vectors to their first `dim` components, then normalise them.

    Args:
        raw: raw vectors [N, D], as the graph returns them.
        dim: number of components to keep.
        normalize: divide each truncated vector by its norm.

    Returns:
        float32 [N, dim].

    Raises:
        BackendError: a vector has NaN or infinite components.
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
    """Softmax of the model's logits, which are cosine × exp(logit_scale).

    Args:
        cosines: cosine similarities [texts, images].
        logit_scale: the checkpoint's logit scale.
        over: "texts" makes the probabilities of each image sum to 1, "images" those of each text.

    Returns:
        float64 [texts, images].
    """
    logits = cosines.astype(np.float64) * np.exp(logit_scale)
    axis = 0 if over == "texts" else 1
    odds = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return np.asarray(odds / odds.sum(axis=axis, keepdims=True))
