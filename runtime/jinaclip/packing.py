"""Batching of texts: texts of similar length share a batch, within the memory limit of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jinaclip.backends.cost import CPU_COST, RunCost, predicted_bytes
from jinaclip.bundle.manifest import TowerManifest


def pack_texts(
    lengths: Sequence[int], tower: TowerManifest, *, batch_size: int | None = None, cost: RunCost = CPU_COST
) -> list[list[int]]:
    """Group texts into batches with the lowest total cost. A run costs its overhead, its tokens and its padding.

    The longest texts come first, so that the largest run happens before the memory arena is fragmented.

    Args:
        lengths: number of tokens of each text.
        tower: the text tower, for the prediction of memory.
        batch_size: the largest number of texts in a batch. Batches are then filled up to it, even with texts of very
            different lengths. None chooses the fastest batches.
        cost: cost of a run on the device.

    Returns:
        The indices of each batch's texts.
    """
    order = np.array(sorted(range(len(lengths)), key=lambda i: -lengths[i]), np.int64)
    longest = np.array([lengths[i] for i in order], np.int64)
    if batch_size is None:
        starts = _cheapest_starts(longest, tower, cost)
    else:
        starts = _filled_starts(longest, tower, cost, batch_size)
    return [batch.tolist() for batch in np.split(order, starts[1:])] if len(order) else []


def _cheapest_starts(longest: np.ndarray, tower: TowerManifest, cost: RunCost) -> list[int]:
    """Index of the first text of each run, for texts in descending order of length. Dynamic programming finds the
    division with the lowest total cost.
    """
    count = len(longest)
    tokens = np.concatenate([[0], np.cumsum(longest)])  # [n]: tokens of the first n texts
    least = np.zeros(count + 1)  # [n]: lowest cost of the first n texts
    begins = np.zeros(count + 1, np.int64)  # [n]: start of the last run of the first n texts
    for end in range(1, count + 1):
        first = max(0, end - max(1, cost.tokens // int(longest[end - 1])))
        begin = np.arange(first, end)
        rows = end - begin
        work = cost.work(rows, longest[begin], tokens[end] - tokens[begin])
        total = least[begin] + cost.opening_tokens + work
        total[(rows > 1) & ~_fits(rows, longest[begin], work, tower, cost)] = np.inf
        best = int(total.argmin())
        least[end], begins[end] = total[best], first + best
    starts, end = [], count
    while end:
        end = int(begins[end])
        starts.append(end)
    return starts[::-1]


def _filled_starts(longest: np.ndarray, tower: TowerManifest, cost: RunCost, most: int) -> list[int]:
    """Index of the first text of each run, with `most` texts in a run, or fewer if that exceeds the limits."""
    starts = [0]
    for index in range(1, len(longest)):
        rows, first = np.array(index + 1 - starts[-1]), longest[starts[-1]]
        work = cost.work(rows, first, longest[starts[-1] : index + 1].sum())
        if rows > most or not _fits(rows, first, work, tower, cost):
            starts.append(index)
    return starts


def _fits(rows: np.ndarray, longest: np.ndarray, work: np.ndarray, tower: TowerManifest, cost: RunCost) -> np.ndarray:
    """Whether runs are within the limits on work and memory. Elementwise: bool, of the shape of the arguments.

    Args:
        rows: number of texts in each run.
        longest: number of tokens of each run's longest text.
        work: cost of each run, in tokens.
        tower, cost: as for `pack_texts`.
    """
    if cost.packed:  # texts are concatenated without padding and need no mask
        rows, longest = work, np.ones_like(work)
    memory = predicted_bytes(rows, longest, tower, tiled=not cost.writes_scores)
    return np.asarray((work <= cost.tokens) & (memory <= cost.budget_bytes))
