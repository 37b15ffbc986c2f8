"""Cost of a run, in time and memory.

Attention on the CPU stores its scores, float32 [B, heads, T, T]. A run's memory therefore depends on the lengths and
not only on the number of texts: 64 short texts need little memory, a single text of 8192 tokens needs gigabytes.
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
# Larger runs release their memory afterwards, because the memory arena does not shrink by itself.
RELEASE_BYTES = 256 << 20


@dataclass(frozen=True)
class RunCost:
    """Cost of a run on a kind of device. Determines how inputs are batched.

    Attributes:
        opening_tokens: fixed overhead of a run, as a number of tokens that take the same time.
        tokens: largest batch, in tokens, the cost of padding included. Larger batches are not faster.
        images: number of images in a batch, unless the caller sets it.
        budget_bytes: largest predicted memory of a run, in bytes. A run of one row is always allowed.
        writes_scores: attention stores its scores, so memory grows with the square of the length.
        padding, padding_growth: cost of a padding token in a run of rows of n tokens, relative to a token of text:
            padding + padding_growth · n, at most 1.
        packed: texts are concatenated without padding, so padding needs no memory.
        tiled_above: attention over unpadded texts with more tokens than this runs in tiles and does not store its
            scores. None: it never does.
    """

    opening_tokens: int
    tokens: int
    images: int
    budget_bytes: int
    writes_scores: bool
    padding: float = 1.0
    padding_growth: float = 0.0
    packed: bool = False
    tiled_above: int | None = None

    def work(self, rows: N, longest: N, tokens: N) -> np.ndarray:
        """Cost of runs without their fixed overhead, in tokens. Elementwise.

        Args:
            rows: number of rows in each run.
            longest: number of tokens in each run's longest row.
            tokens: total number of tokens in each run, without padding.

        Returns:
            An array of the shape of the arguments.
        """
        padding = np.minimum(1.0, self.padding + self.padding_growth * longest)
        return np.asarray(tokens + padding * (rows * longest - tokens))


# Measured on 2 cores (docs/decisions/006).
CPU_COST = RunCost(opening_tokens=11, tokens=512, images=1, budget_bytes=BUDGET_BYTES, writes_scores=True)
# For prepared graphs in which only attention computes padding.
UNPADDED_CPU_COST = replace(CPU_COST, padding=0.05, padding_growth=0.001)
# Estimates: on a GPU a run takes one or two milliseconds, independently of its size, until the GPU is fully used.
GPU_COST = RunCost(opening_tokens=512, tokens=16384, images=16, budget_bytes=4 << 30, writes_scores=False)
# Concatenated texts without padding. Measured on an H200 (docs/decisions/027): one run of 512 texts with 3 to 357
# tokens is faster than two runs divided by length. A padding position only costs 4 bytes of memory.
PACKED_GPU_COST = replace(GPU_COST, tokens=32768, padding=0.001, packed=True)


def predicted_bytes(rows: N, tokens: N, tower: TowerManifest, *, tiled: bool = False) -> N:
    """Predict the memory that a run adds while it lasts: the scores and mask of one block, and its activations.

    Measured on the full-size text tower, fp32, 2 cores: 64 × 32 tokens 252 MiB, 1 × 2048 520 MiB, 1 × 4096
    1.5 GiB, 1 × 8192 9.5 GiB. The scores count twice because, for long texts, the arena cannot reuse the memory of the
    previous block's scores.

    Args:
        rows: number of rows in the run, or an array with those of several runs.
        tokens: number of tokens per row, padding included, or an array.
        tower: the text tower.
        tiled: attention runs in tiles and does not store its scores.

    Returns:
        Bytes; an array if the arguments are arrays.
    """
    scores = 2 * rows * tower.heads * tokens * tokens * 4
    mask = 2 * rows * tokens * tokens
    activations = rows * tokens * 4 * (7 * tower.width + 6 * tower.hidden_size)
    return activations + mask + (0 if tiled else scores)


def is_tiled(ids: np.ndarray, pad: int, tiled_above: int | None) -> bool:
    """Whether attention over ids [B, T] runs in tiles. Prepared graphs do this for long texts without padding."""
    return tiled_above is not None and ids.shape[1] > tiled_above and not (ids == pad).any()


def require_memory(rows: int, tokens: int, tower: TowerManifest, *, tiled: bool = False) -> int:
    """Check before a run that there is enough memory. Without the check the kernel could kill the process.

    Args:
        rows, tokens, tower, tiled: as for `predicted_bytes`.

    Returns:
        The predicted memory, in bytes.

    Raises:
        InputError: there is not enough memory; the message has the predicted and the free memory.
    """
    needed = predicted_bytes(rows, tokens, tower, tiled=tiled)
    if needed <= BUDGET_BYTES // 4:
        return needed
    free = available_memory()
    if free is not None and needed > free:
        raise InputError(
            f"a text of {tokens} tokens needs about {needed / 2**30:.1f} GiB on top of the model, but "
            f"{free / 2**30:.1f} GiB are free; lower max_length (memory grows with its square)"
            + ("" if tiled else ", or run `jinaclip build`: prepared graphs need less memory for long texts")
        )
    return needed
