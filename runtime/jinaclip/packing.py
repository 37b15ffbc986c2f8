"""Which texts run together: similar lengths, and never more memory than a budget allows.

Attention on the CPU writes its scores out, [B, heads, T, T] float32, so memory is predicted from bytes and
not from a number of items: 64 short texts are nothing, one of 8192 tokens is gigabytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from jinaclip.bundle import TowerManifest
from jinaclip.errors import InputError

N = TypeVar("N", int, npt.NDArray[np.int64])
BUDGET_BYTES = 1 << 30
# A run of more than this gives its memory back: the arena never shrinks by itself.
RELEASE_BYTES = 256 << 20


@dataclass(frozen=True)
class RunCost:
    """What a run costs on a kind of device, for those who decide what runs together.

    Attributes:
        opening_tokens: opening a run costs about as much as this many tokens.
        tokens: in a run, with what its padding costs; with more it is no faster, and memory grows.
        images: in a run, where the caller does not say.
        budget_bytes: that a run may add to memory, by prediction; one row is always allowed.
        writes_scores: attention writes its scores out, so that memory grows with the square of the length.
        padding, padding_growth: a place of padding in a run of rows of n tokens costs as much as
            padding + padding_growth · n tokens, 1 at most.
        packed: texts lie one after the other, and padding takes no memory.
    """

    opening_tokens: int
    tokens: int
    images: int
    budget_bytes: int
    writes_scores: bool
    padding: float = 1.0
    padding_growth: float = 0.0
    packed: bool = False

    def work(self, rows: N, longest: N, tokens: N) -> np.ndarray:
        """What runs cost but for opening them, in tokens, of the arguments' shape.

        Args:
            rows, longest, tokens: of runs: rows, the length of the longest, and the tokens of all rows.
        """
        padding = np.minimum(1.0, self.padding + self.padding_growth * longest)
        return np.asarray(tokens + padding * (rows * longest - tokens))


# Measured on 2 cores (DECISIONS.md 6).
CPU_COST = RunCost(opening_tokens=11, tokens=512, images=1, budget_bytes=BUDGET_BYTES, writes_scores=True)
# Where padding is computed by attention alone.
UNPADDED_CPU_COST = replace(CPU_COST, padding=0.05, padding_growth=0.001)
# Not measured: on a GPU a run takes a millisecond or two whatever is in it, until it is full.
GPU_COST = RunCost(opening_tokens=512, tokens=16384, images=16, budget_bytes=4 << 30, writes_scores=False)
# Texts one after the other, without padding. Measured on an H200 (DECISIONS.md 27): one run of 512 texts of 3 to 357
# tokens takes less time than two by length. A place costs 4 bytes of memory.
PACKED_GPU_COST = replace(GPU_COST, tokens=32768, padding=0.001, packed=True)


def predicted_bytes(rows: N, tokens: N, tower: TowerManifest, *, tiled: bool = False) -> N:
    """Memory one run adds while it lasts: scores and mask of one block, and the activations around it.

    Args:
        rows, tokens: of the run; or arrays of them, for several.
        tiled: attention runs in tiles, which keep no scores.

    Measured on the full-size text tower, fp32, 2 cores: 64 × 32 tokens 252 MiB, 1 × 2048 520 MiB, 1 × 4096
    1.5 GiB, 1 × 8192 9.5 GiB. Scores count twice: with long texts the arena cannot reuse the block before's.
    """
    scores = 2 * rows * tower.heads * tokens * tokens * 4
    mask = 2 * rows * tokens * tokens
    activations = rows * tokens * 4 * (7 * tower.width + 6 * tower.hidden_size)
    return activations + mask + (0 if tiled else scores)


def is_tiled(ids: np.ndarray, pad: int, tiled_above: int | None) -> bool:
    """Whether attention over ids [B, T] runs in tiles: in a prepared graph, for long texts without padding."""
    return tiled_above is not None and ids.shape[1] > tiled_above and not (ids == pad).any()


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


def require_memory(rows: int, tokens: int, tower: TowerManifest, *, tiled: bool = False) -> None:
    """Refuse a run that cannot fit, before it starts: the kernel would kill the process in the middle.

    Raises:
        InputError: says what the run needs and what is free.
    """
    needed = predicted_bytes(rows, tokens, tower, tiled=tiled)
    if needed <= BUDGET_BYTES // 4:
        return
    free = available_memory()
    if free is not None and needed > free:
        raise InputError(
            f"a text of {tokens} tokens needs about {needed / 2**30:.1f} GiB on top of the model, but "
            f"{free / 2**30:.1f} GiB are free; lower max_length (memory grows with its square)"
            + ("" if tiled else ", or run `jinaclip build`: prepared graphs work through long texts in tiles")
        )


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be allocated without swapping, by the kernel and the cgroup; None where nothing tells."""
    limits = []
    with suppress(OSError, ValueError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            limits.append(max(0, int(limit) - int((cgroup / "memory.current").read_text())))
    if not limits and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)
