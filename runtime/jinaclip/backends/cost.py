"""What a run costs, in time and in memory.

Attention on the CPU writes its scores out, [B, heads, T, T] float32, so memory is predicted from bytes and not from a
number of items: 64 short texts are nothing, one of 8192 tokens is gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from jinaclip.backends.machine import available_memory
from jinaclip.bundle.manifest import TowerManifest
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


# Measured on 2 cores (docs/decisions/006).
CPU_COST = RunCost(opening_tokens=11, tokens=512, images=1, budget_bytes=BUDGET_BYTES, writes_scores=True)
# Where padding is computed by attention alone.
UNPADDED_CPU_COST = replace(CPU_COST, padding=0.05, padding_growth=0.001)
# Not measured: on a GPU a run takes a millisecond or two whatever is in it, until it is full.
GPU_COST = RunCost(opening_tokens=512, tokens=16384, images=16, budget_bytes=4 << 30, writes_scores=False)
# Texts one after the other, without padding. Measured on an H200 (docs/decisions/027): one run of 512 texts of 3 to 357
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


def require_memory(rows: int, tokens: int, tower: TowerManifest, *, tiled: bool = False) -> int:
    """Refuse a run that cannot fit, before it starts: the kernel would kill the process in the middle.

    Args:
        rows, tokens, tower, tiled: as for `predicted_bytes`.

    Returns:
        Predicted bytes.

    Raises:
        InputError: says what the run needs and what is free.
    """
    needed = predicted_bytes(rows, tokens, tower, tiled=tiled)
    if needed <= BUDGET_BYTES // 4:
        return needed
    free = available_memory()
    if free is not None and needed > free:
        raise InputError(
            f"a text of {tokens} tokens needs about {needed / 2**30:.1f} GiB on top of the model, but "
            f"{free / 2**30:.1f} GiB are free; lower max_length (memory grows with its square)"
            + ("" if tiled else ", or run `jinaclip build`: prepared graphs work through long texts in tiles")
        )
    return needed
