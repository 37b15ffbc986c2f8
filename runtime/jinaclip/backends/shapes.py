"""Shapes of an engine's inputs: its optimisation profiles, and the buckets that batches are padded to.

A compiled engine accepts only shapes within its profiles. The first run of a new shape is slow, because kernels are
chosen, memory is planned and a CUDA graph is captured. Batches are therefore padded to a small set of sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Sizes that rows and tokens are padded to: powers of two, and those times 1.5, which limits the padding.
LADDER = (1, *sorted({2**n for n in range(1, 14)} | {3 * 2**n for n in range(12)}))
SHORTEST = 16  # tokens; shorter texts are padded to it, because matrix units process 16 rows at once


@dataclass(frozen=True)
class Profile:
    """The shapes of one optimisation profile: (minimum, optimum, maximum) of each size.

    Attributes:
        name: name of the profile, such as "latency".
        batch: number of rows.
        tokens: number of tokens in a row, for texts. None for images, whose size is fixed.
    """

    name: str
    batch: tuple[int, int, int]
    tokens: tuple[int, int, int] | None = None

    @property
    def corner(self) -> int:
        """Rows × tokens of the largest shape. The profile's memory grows with it."""
        return self.batch[2] * (self.tokens[2] if self.tokens else 1)

    def to_json(self) -> dict[str, Any]:
        """The profile as JSON-compatible values, for an engine's sidecar."""
        return {"name": self.name, "batch": list(self.batch), "tokens": None if self.tokens is None else [*self.tokens]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Profile:
        """The profile that `to_json` wrote. Raises KeyError, TypeError or ValueError if `value` is not a profile."""
        tokens = value["tokens"]
        return cls(str(value["name"]), _three(value["batch"]), None if tokens is None else _three(tokens))


@dataclass(frozen=True)
class Bucket:
    """A shape that batches are padded to: the profile's number, the rows and, for texts, the tokens per row."""

    profile: int
    rows: int
    tokens: int | None


def bucket_for(rows: int, tokens: int | None, profiles: Sequence[Profile]) -> Bucket | None:
    """The smallest bucket for a batch, in the matching profile that needs the least memory.

    Args:
        rows: number of rows in the batch.
        tokens: number of tokens in its longest row. None for images.
        profiles: the engine's profiles.

    Returns:
        The bucket, or None if the batch is within no profile.
    """
    for number, profile in sorted(enumerate(profiles), key=lambda entry: entry[1].corner):
        height, length = _step(rows, profile.batch), None
        if profile.tokens is not None and tokens is not None:
            length = _step(max(tokens, SHORTEST), profile.tokens)
        if height is not None and (length is not None or profile.tokens is None):
            return Bucket(number, height, length)
    return None


def most_rows(tokens: int | None, profiles: Sequence[Profile]) -> int:
    """The largest number of rows with this many tokens in one run; 0 if the length is within no profile."""
    return max((profile.batch[2] for profile in profiles if bucket_for(1, tokens, [profile])), default=0)


def common_buckets(profiles: Sequence[Profile]) -> list[Bucket]:
    """Buckets to prepare before the first request: one row of every length in LADDER up to the largest optimum of a
    profile, and the optimal shape of each profile.
    """
    shapes: list[tuple[int, int | None]] = [(p.batch[1], p.tokens and p.tokens[1]) for p in profiles]
    lengths = [tokens for _, tokens in shapes if tokens is not None]
    singles = [step for step in LADDER if SHORTEST <= step <= max(lengths)] if lengths else [None]
    found = (bucket_for(rows, tokens, profiles) for rows, tokens in [*((1, length) for length in singles), *shapes])
    return list(dict.fromkeys(bucket for bucket in found if bucket is not None))


def _step(wanted: int, limits: tuple[int, int, int]) -> int | None:
    """`wanted` rounded up to the next size in LADDER and clamped to the limits; None if it is above them."""
    if wanted > limits[2]:
        return None
    step = next((step for step in LADDER if step >= wanted), limits[2])
    return min(max(step, limits[0]), limits[2])


def _three(values: Any) -> tuple[int, int, int]:
    least, best, most = (int(value) for value in values)
    if not 1 <= least <= best <= most:
        raise ValueError(f"{values} is not in ascending order from 1")
    return least, best, most


def pad_into(staging: Any, batch: Any, pad: int) -> None:
    """Copy a batch into an array of the size of its bucket, and pad it.

    Unused rows of a text batch repeat its first row, because the vector of a row with only padding would be NaN.
    Unused rows of an image batch are not changed.

    Args:
        staging: the target, [rows, tokens] of the bucket for texts, [rows, …] for images.
        batch: the batch, with at most as many rows and tokens.
        pad: token id that fills the rest of a row.
    """
    rows = len(batch)
    if staging.ndim == 2:
        tokens = batch.shape[1]
        staging[:rows, :tokens] = batch
        staging[:rows, tokens:] = pad
        staging[rows:] = staging[0]
    else:
        staging[:rows] = batch
