"""Shapes that an engine runs: its optimisation profiles, and the few sizes within them that batches are padded to.

A compiled engine accepts the shapes of its profiles alone. Within one, a new shape costs a first run (kernels are
chosen, memory is planned, a CUDA graph is captured), so batches are padded to sizes from a short ladder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# From 2 on each is at most half above the one before: the most that padding costs.
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
          6144, 8192)  # fmt: skip
SHORTEST = 16  # tokens: shorter texts are padded to it, a matrix unit works on 16 rows at once


@dataclass(frozen=True)
class Profile:
    """Shapes of one optimisation profile, each (least, best, most).

    Attributes:
        name: "latency", …
        batch: rows.
        tokens: of a row, for texts; None for images, whose size is fixed.
    """

    name: str
    batch: tuple[int, int, int]
    tokens: tuple[int, int, int] | None = None

    @property
    def corner(self) -> int:
        """Rows × tokens at its largest: what its memory grows with."""
        return self.batch[2] * (self.tokens[2] if self.tokens else 1)

    def holds(self, rows: int, tokens: int | None) -> bool:
        """Whether a shape is in it."""
        inside = self.batch[0] <= rows <= self.batch[2]
        return inside and (self.tokens is None or (tokens is not None and self.tokens[0] <= tokens <= self.tokens[2]))

    def to_json(self) -> dict[str, Any]:
        """For a sidecar."""
        return {"name": self.name, "batch": list(self.batch), "tokens": None if self.tokens is None else [*self.tokens]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Profile:
        """Raises KeyError, TypeError or ValueError where it is no profile."""
        tokens = value["tokens"]
        return cls(str(value["name"]), _three(value["batch"]), None if tokens is None else _three(tokens))


@dataclass(frozen=True)
class Bucket:
    """A shape to pad to: a profile's number, rows, and tokens for texts."""

    profile: int
    rows: int
    tokens: int | None


def bucket_for(rows: int, tokens: int | None, profiles: Sequence[Profile]) -> Bucket | None:
    """The smallest bucket that a batch fits into, of the profile with the least memory; None if no profile holds it.

    Args:
        rows: of the batch.
        tokens: of its longest row; None for images.
    """
    found = None
    for number, profile in enumerate(profiles):
        wanted = None
        if profile.tokens is not None and tokens is not None:
            wanted = _step(max(tokens, SHORTEST), profile.tokens)
        row = _step(rows, profile.batch)
        if row is None or (profile.tokens is not None and wanted is None):
            continue
        if found is None or profile.corner < profiles[found.profile].corner:
            found = Bucket(number, row, wanted)
    return found


def most_rows(tokens: int | None, profiles: Sequence[Profile]) -> int:
    """Most rows of so many tokens that one run takes; 0 if no profile holds the length."""
    fitting = [
        profile.batch[2]
        for profile in profiles
        if profile.tokens is None or (tokens is not None and _step(max(tokens, SHORTEST), profile.tokens) is not None)
    ]
    return max(fitting, default=0)


def common_buckets(profiles: Sequence[Profile]) -> list[Bucket]:
    """Buckets to prepare before the first request: one row at every length of the ladder up to the longest "best"
    length, and the best shape of each profile.
    """
    shapes: list[tuple[int, int | None]] = [(p.batch[1], p.tokens and p.tokens[1]) for p in profiles]
    lengths = [tokens for _, tokens in shapes if tokens is not None]
    singles = [step for step in LADDER if SHORTEST <= step <= max(lengths)] if lengths else [None]
    found = (bucket_for(rows, tokens, profiles) for rows, tokens in [*((1, length) for length in singles), *shapes])
    return list(dict.fromkeys(bucket for bucket in found if bucket is not None))


def _step(wanted: int, limits: tuple[int, int, int]) -> int | None:
    """The next of the ladder within limits, or their end; None above it."""
    if wanted > limits[2]:
        return None
    step = next((step for step in LADDER if step >= wanted), limits[2])
    return min(max(step, limits[0]), limits[2])


def _three(values: Any) -> tuple[int, int, int]:
    least, best, most = (int(value) for value in values)
    if not 1 <= least <= best <= most:
        raise ValueError(f"{values} does not rise")
    return least, best, most


def pad_into(staging: Any, batch: Any, pad: int) -> None:
    """Write a batch into a larger array of its bucket.

    Args:
        staging: [rows, …] of the bucket; its rows of images that are not filled keep what they held.
        batch: [fewer rows, …], of texts [fewer rows, fewer tokens].
        pad: id that fills the rest of a row. Rows beyond the batch repeat its first: a row of padding alone would
            have nothing to attend to, and be NaN.
    """
    rows = len(batch)
    if staging.ndim == 2:
        tokens = batch.shape[1]
        staging[:rows, :tokens] = batch
        staging[:rows, tokens:] = pad
        staging[rows:] = staging[0]
    else:
        staging[:rows] = batch
