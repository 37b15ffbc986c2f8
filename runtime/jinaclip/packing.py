"""Which texts run together: similar lengths, and never more memory than a budget allows.

Attention on the CPU writes its scores out, [B, heads, T, T] float32, so memory is predicted from bytes and
not from a number of items: 64 short texts are nothing, one of 8192 tokens is gigabytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jinaclip.bundle import TowerManifest
from jinaclip.errors import InputError

BUDGET_BYTES = 1 << 30
# A run of more than this gives its memory back: the arena never shrinks by itself.
RELEASE_BYTES = 256 << 20


@dataclass(frozen=True)
class RunCost:
    """What a run costs on a kind of device, for those who decide what runs together.

    Attributes:
        opening_tokens: opening a run costs about as much as this many tokens: padding a text by more is dearer than a
            run of its own.
        padding_tokens: most padding of a run, all rows together; None for no limit.
        tokens: in a run; with more it is no faster, and padding and memory grow.
        images: in a run, where the caller does not say.
        budget_bytes: that a run may add to memory, by prediction; one row is always allowed.
        writes_scores: attention writes its scores out, so that memory grows with the square of the length.
    """

    opening_tokens: int
    padding_tokens: int | None
    tokens: int
    images: int
    budget_bytes: int
    writes_scores: bool


# Measured on 2 cores (DECISIONS.md 6).
CPU_COST = RunCost(
    opening_tokens=5, padding_tokens=None, tokens=512, images=1, budget_bytes=BUDGET_BYTES, writes_scores=True
)
# Not measured: on a GPU a run takes a millisecond or two whatever is in it, until it is full.
GPU_COST = RunCost(
    opening_tokens=512, padding_tokens=512, tokens=16384, images=16, budget_bytes=4 << 30, writes_scores=False
)


def predicted_bytes(rows: int, tokens: int, tower: TowerManifest, *, tiled: bool = False) -> int:
    """Memory one run adds while it lasts: scores and mask of one block, and the activations around it.

    Args:
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

    Texts of nearly equal length run together; one long text never makes short ones pay for its padding.

    Args:
        lengths: tokens of each text.
        batch_size: most texts in a batch, however unequal they are; None for what is quickest.
        cost: of a run where they will run.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    longest = padding = 0
    for index in order:
        count = len(batches[-1]) + 1 if batches else 0
        fits = (
            batches
            and count <= (batch_size or count)
            and (batch_size is not None or longest - lengths[index] <= cost.opening_tokens)
            and (cost.padding_tokens is None or padding + longest - lengths[index] <= cost.padding_tokens)
            and count * longest <= cost.tokens
            and predicted_bytes(count, longest, tower, tiled=not cost.writes_scores) <= cost.budget_bytes
        )
        if fits:
            batches[-1].append(index)
            padding += longest - lengths[index]
        else:
            batches.append([index])
            longest, padding = lengths[index], 0
    return batches


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
