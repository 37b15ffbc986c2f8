"""Metrics of a certificate: the differences between two sets of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jinaclip.embeddings import truncate

NEIGHBOURS = 10
_ROWS = 1024  # rows of a similarity matrix that are in memory at once


def unit(raw: np.ndarray, dim: int) -> np.ndarray:
    """The user's embeddings for raw vectors [N, D]: truncated, normalised, float32; here as float64 [N, dim]."""
    return truncate(raw, dim).astype(np.float64)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` [N, D] with the same row of `b`: [N]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: np.ndarray = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    return result


def compare(
    found: np.ndarray,
    reference: np.ndarray,
    dim: int,
    *,
    across: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """The metrics of one dim.

    Args:
        found, reference: raw vectors [N, D] of the same N items.
        across: raw vectors of the other tower, found and reference.

    Returns:
        cosine: min, p1 (1st percentile) and mean over the items of the cosine between found and reference.
        max_abs: largest absolute difference of a component.
        error_ratio: error ÷ distance from the reference vector to the nearest other item's, max and median.
        top10: mean share of each item's ten nearest items that found and reference have in common, `within` the tower
            and `across` towers.
    """
    f, r = unit(found, dim), unit(reference, dim)
    same = cosines(f, r)
    ratios = np.linalg.norm(f - r, axis=1) / np.maximum(distance_to_nearest(r), 1e-6)
    top10 = {"within": float(shared_neighbours(f, f, r, r, same_set=True).mean())}
    if across is not None:
        top10["across"] = float(shared_neighbours(f, unit(across[0], dim), r, unit(across[1], dim)).mean())
    return {
        "cosine": {"min": float(same.min()), "p1": float(np.percentile(same, 1)), "mean": float(same.mean())},
        "max_abs": float(np.abs(f - r).max()),
        "error_ratio": {"max": float(ratios.max()), "median": float(np.median(ratios))},
        "top10": top10,
    }


def distance_to_nearest(units: np.ndarray) -> np.ndarray:
    """Euclidean distance of each row [N, D] to the nearest other: [N]."""
    nearest = np.empty(len(units))
    for start in range(0, len(units), _ROWS):
        cosine = units[start : start + _ROWS] @ units.T
        cosine[np.arange(len(cosine)), start + np.arange(len(cosine))] = -np.inf
        at = cosine.argmax(axis=1)
        nearest[start : start + _ROWS] = np.linalg.norm(units[start : start + _ROWS] - units[at], axis=1)
    return nearest


def shared_neighbours(
    queries: np.ndarray, items: np.ndarray, old_queries: np.ndarray, old_items: np.ndarray, *, same_set: bool = False
) -> np.ndarray:
    """Share of each query's ten nearest items that are also among the old query's ten nearest old items: [N].

    Args:
        queries, old_queries: unit vectors [N, D] of the same queries.
        items, old_items: unit vectors [M, D] of the same items.
        same_set: whether the queries are the items; an item is then not counted as its own neighbour.
    """
    count = min(NEIGHBOURS, len(items) - same_set)
    shares: list[float] = []
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        own = start if same_set else None
        new = _nearest(queries[rows] @ items.T, count, own)
        old = _nearest(old_queries[rows] @ old_items.T, count, own)
        shares += [len(set(a) & set(b)) / count for a, b in zip(new.tolist(), old.tolist(), strict=True)]
    return np.array(shares)


def batch_effect(alone: np.ndarray, batched: np.ndarray, dims: Sequence[int]) -> dict[str, float]:
    """Difference between the raw vectors [N, D] of the same items run alone and run in a batch.

    Returns:
        max_abs: largest difference of a component of the full unit vector.
        cosine: smallest cosine at any dim.
    """
    least = min(float(cosines(unit(alone, dim), unit(batched, dim)).min()) for dim in dims)
    full = max(dims)
    return {"max_abs": float(np.abs(unit(alone, full) - unit(batched, full)).max()), "cosine": least}


def _nearest(similarity: np.ndarray, count: int, own: int | None) -> np.ndarray:
    """Columns of the `count` largest values of each row. `own` is the first row's own column, which is excluded."""
    if own is not None:
        similarity[np.arange(len(similarity)), own + np.arange(len(similarity))] = -np.inf
    return np.argpartition(-similarity, count - 1, axis=1)[:, :count]
