"""What a run is asked for, and what a case becomes once it is open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jinaclip.bundle import Bundle
from jinaclip_bench.cases import Case
from jinaclip_bench.measure import Side

if TYPE_CHECKING:
    from jinaclip_export.checkpoint import Checkpoint


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run.

    Attributes:
        checkpoint: of the bundle; without it there is nothing to compare with.
        precisions: of the bundle's graphs: one side of ours for each.
        fused: the graph of both towers, where it is measured (jinaclip_bench.fused).
        suite: for the records; None where cases were named one by one.
    """

    bundle: Bundle
    checkpoint: Checkpoint | None
    threads: int
    repeats: int
    precisions: tuple[str, ...] = ("fp32",)
    fused: Path | None = None
    suite: str | None = None


@dataclass(frozen=True)
class Opened:
    """A case that is ready.

    Attributes:
        sides: by name, ours first.
        shape: of what goes in.
        tokens: in a call, padding excluded; None for images.
        threads: that a call uses.
        rounds, burn_in: timed calls of each side, and calls before them.
        steady: whether items per second mean anything: not where a new process starts within the time.
    """

    sides: Mapping[str, Side]
    shape: tuple[int, ...]
    tokens: int | None
    threads: int
    rounds: int
    burn_in: int = 3
    steady: bool = True


# ids [B, T] or pixels uint8 [B, S, S, 3] -> unit vectors float32 [B, D]
Embed = Callable[[np.ndarray], np.ndarray]
Kind = Callable[[Case, Settings, Mapping[str, Embed]], AbstractContextManager[Opened]]
