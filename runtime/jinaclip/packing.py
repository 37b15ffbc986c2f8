"""Which texts run together: those of similar length, within the memory that a run may take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jinaclip.backends.cost import CPU_COST, RunCost, predicted_bytes
from jinaclip.bundle.manifest import TowerManifest


def pack_texts(
    lengths: Sequence[int], tower: TowerManifest, *, batch_size: int | None = None, cost: RunCost = CPU_COST
) -> list[list[int]]:
    """Batches of indices, longest texts first, so that the largest run comes before the arena is fragmented.

    Texts of like length run together, in the runs that cost least in all: each its opening, its tokens and its padding.

    Args:
        lengths: tokens of each text.
        batch_size: most texts in a batch, which then is filled however unequal they are; None for what is quickest.
        cost: of a run where they will run.
    """
    order = np.array(sorted(range(len(lengths)), key=lambda i: -lengths[i]), np.int64)
    longest = np.array([lengths[i] for i in order], np.int64)
    if batch_size is None:
        starts = _cheapest_starts(longest, tower, cost)
    else:
        starts = _filled_starts(longest, tower, cost, batch_size)
    return [batch.tolist() for batch in np.split(order, starts[1:])] if len(order) else []


def _cheapest_starts(longest: np.ndarray, tower: TowerManifest, cost: RunCost) -> list[int]:
    """Where runs begin among texts whose lengths fall: of all ways to part them the cheapest, found run by run."""
    count = len(longest)
    tokens = np.concatenate([[0], np.cumsum(longest)])  # of the first n texts
    least = np.zeros(count + 1)  # of the first n texts
    begins = np.zeros(count + 1, np.int64)  # of the last run of the first n texts
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
    """Where runs begin, each with as many texts as are asked for and fit."""
    starts = [0]
    for index in range(1, len(longest)):
        rows, first = np.array(index + 1 - starts[-1]), longest[starts[-1]]
        work = cost.work(rows, first, longest[starts[-1] : index + 1].sum())
        if rows > most or not _fits(rows, first, work, tower, cost):
            starts.append(index)
    return starts


def _fits(rows: np.ndarray, longest: np.ndarray, work: np.ndarray, tower: TowerManifest, cost: RunCost) -> np.ndarray:
    """Whether runs of so many rows, each so long, and so much work may be: bool, of the arrays' shape."""
    if cost.packed:  # one after the other, and no mask
        rows, longest = work, np.ones_like(work)
    memory = predicted_bytes(rows, longest, tower, tiled=not cost.writes_scores)
    return np.asarray((work <= cost.tokens) & (memory <= cost.budget_bytes))
