"""Time the sides of a case in turn, A B C A B C …, and compare what they return.

Side by side in one run, a machine that slows down slows every side: the ratio of one round means something
where two absolute figures of different minutes do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jinaclip_bench.errors import BenchError

OURS = "jinaclip"
# After a call, onnxruntime's threads spin on for about 20 ms each and torch's for 5 (2 cores), and would take the
# cores from the side that comes next: without a pause, torch's barriers stalled for 200 ms.
SETTLE_S = 0.1
# Sides further apart than this do not compute the same thing. bfloat16 has 8 bits, and 24 blocks to lose them in.
LOWEST_COSINE = {"torch-fp32": 0.99, "torch-bf16": 0.95}


@dataclass(frozen=True)
class Sample:
    """One timed call.

    Attributes:
        seconds: how long it took.
        output: what it returned: vectors [rows, D], or pixels.
        peak_rss_mib, pss_mib: of the process that ran it, where it had one for itself.
    """

    seconds: float
    output: np.ndarray
    peak_rss_mib: float | None = None
    pss_mib: float | None = None


Side = Callable[[], Sample]


def timed(call: Callable[[], np.ndarray]) -> Side:
    """The side that a call in this process is."""

    def side() -> Sample:
        start = time.perf_counter()
        output = call()
        return Sample(time.perf_counter() - start, output)

    return side


def interleave(
    sides: Mapping[str, Side], rounds: int, *, advance: Callable[[], None] = lambda: None
) -> dict[str, list[Sample]]:
    """`rounds` samples of each side; sample i of every side is from round i."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            time.sleep(SETTLE_S)
            samples[name].append(side())
        advance()
    return samples


def agreement(outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Lowest cosine, over the rows, of each other side's vectors with ours.

    Raises:
        BenchError: a side returns something else, so that comparing the times would mean nothing.
    """
    ours = outputs[OURS]
    cosines = {}
    for name in outputs.keys() - {OURS}:
        if outputs[name].shape != ours.shape:
            raise BenchError(f"{name} returns shape {outputs[name].shape}, {OURS} {ours.shape}; expected equal shapes")
        cosine = float((_unit(outputs[name]) * _unit(ours)).sum(axis=-1).min())
        if not cosine >= LOWEST_COSINE[name]:  # also when it is NaN
            raise BenchError(
                f"{name} and {OURS} return different vectors (cosine {cosine:.4f}, expected at least "
                f"{LOWEST_COSINE[name]}), so their times are not compared; check the bundle with `jinaclip verify`, "
                "and that the checkpoint's config.json is the one it was exported with"
            )
        cosines[name] = cosine
    return cosines


def summary(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99, min and max, interpolated between neighbours."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "min": min(values), "max": max(values)}


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """theirs ÷ ours of every round, above 1 where ours is faster: p50, and p10 and p90 as its spread."""
    p10, p50, p90 = np.percentile([a / b for a, b in zip(theirs, ours, strict=True)], (10, 50, 90))
    return {"p50": float(p50), "p10": float(p10), "p90": float(p90)}


def _unit(vectors: np.ndarray) -> Any:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
