"""Matryoshka truncation: cut first, normalise after, as the publisher does (arXiv 2205.13147)."""

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
