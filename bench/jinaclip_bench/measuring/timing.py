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

OURS = "jinaclip"  # then a blank and the precision; then a blank and the backend on a GPU, or "served"
# Torch on a GPU: texts one behind the other without padding; and what ends the name of a side that torch.compile made,
# of one that is also captured as a CUDA graph, and of one whose products were chosen by timing.
UNPADDED = "torch-fp16-unpadded"
COMPILED, CAPTURED, AUTOTUNED = "-compiled", "-compiled-graph", "-max-autotune"
# After a call, onnxruntime's threads spin on for about 20 ms each and torch's for 5 (2 cores), and would take the
# cores from the side that comes next: without a pause, torch's barriers stalled for 200 ms.
SETTLE_S = 0.1
# By the precision of the weights: sides further apart than the coarser of the two allows do not compute the same
# thing. bfloat16 has 8 bits, and 24 blocks to lose them in.
LOWEST_COSINE = {"fp32": 0.99, "fp16": 0.99, "bf16": 0.95, "int8": 0.95}


def ours(precision: str, how: str | None = None) -> str:
    """Name of our side in a precision; on a GPU, with a backend."""
    return " ".join([OURS, precision, *([how] if how else [])])


def is_ours(side: str) -> bool:
    """Whether a side is jinaclip, in whatever precision."""
    return side.split()[0] == OURS


def precision_of(side: str) -> str:
    """Of a side's weights, from its name: "torch-bf16", "jinaclip int8". fused-onnx, without one, is fp32."""
    return next((name for name in LOWEST_COSINE if name in side), "fp32")


@dataclass(frozen=True)
class Requests:
    """What a server did in a sample.

    Attributes:
        seconds: of each request, from sending it to having read its answer.
        clients_cpu_s, server_cpu_s: CPU that the two processes used meanwhile; None where the system does not tell.
        batches: the server's runs, by their number of items.
    """

    seconds: Sequence[float]
    clients_cpu_s: float
    server_cpu_s: float | None
    batches: Mapping[int, int]


@dataclass(frozen=True)
class Sample:
    """One timed call.

    Attributes:
        seconds: how long it took.
        output: what it returned: vectors [rows, D], or pixels.
        peak_rss_mib, pss_mib: of the process that ran it, where it had one for itself.
        above_load_mib: peak of the resident set during the call, above what it was before.
        device_s: how long the GPU took for the tower, where that can be told.
        stages: seconds by stage, None for one that cannot be told; where the case tells them.
        requests: where a server was asked.
    """

    seconds: float
    output: np.ndarray
    peak_rss_mib: float | None = None
    pss_mib: float | None = None
    above_load_mib: float | None = None
    device_s: float | None = None
    stages: Mapping[str, float | None] | None = None
    requests: Requests | None = None


Side = Callable[[], Sample]


def timed(
    call: Callable[[], np.ndarray], *, wake: bool = False, device_seconds: Callable[[], float] | None = None
) -> Side:
    """The side that a call in this process is.

    Args:
        wake: call once before, untimed: a GPU that waited while others had their turn lowers its clocks.
        device_seconds: the device's time of all calls since it was asked last.
    """

    def side() -> Sample:
        if wake:
            call()
        if device_seconds is not None:
            device_seconds()
        start = time.perf_counter()
        output = call()
        seconds = time.perf_counter() - start
        return Sample(seconds, output, device_s=None if device_seconds is None else device_seconds())

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


def agreement(outputs: Mapping[str, np.ndarray]) -> dict[tuple[str, str], float]:
    """Lowest cosine, over the rows, of a side's vectors with ours; by (side, ours), for every two different sides.

    Raises:
        BenchError: a side returns something else, so that comparing the times would mean nothing.
    """
    pairs = [(side, mine) for side in outputs for mine in outputs if is_ours(mine) and side != mine]
    return {(side, mine): _cosine(side, outputs[side], mine, outputs[mine]) for side, mine in pairs}


def _cosine(side: str, theirs: np.ndarray, mine: str, expected: np.ndarray) -> float:
    if theirs.shape != expected.shape:
        raise BenchError(f"{side} returns shape {theirs.shape}, {mine} {expected.shape}; expected equal shapes")
    cosine = float((_unit(theirs) * _unit(expected)).sum(axis=-1).min())
    lowest = min(LOWEST_COSINE[precision_of(name)] for name in (side, mine))
    if not cosine >= lowest:  # also when it is NaN
        raise BenchError(
            f"{side} and {mine} return different vectors (cosine {cosine:.4f}, expected at least {lowest}), so their "
            "times are not compared; check the bundle with `jinaclip verify`, and that the checkpoint's config.json "
            "is the one it was exported with"
        )
    return cosine


def summary(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99, min and max, interpolated between neighbours."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "min": min(values), "max": max(values)}


def paired_ratio(theirs: Sequence[float], mine: Sequence[float]) -> dict[str, float]:
    """theirs ÷ mine of every round, above 1 where mine is faster: p50, and p10 and p90 as its spread."""
    return spread([a / b for a, b in zip(theirs, mine, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p10 and p90."""
    p10, p50, p90 = np.percentile(values, (10, 50, 90))
    return {"p50": float(p50), "p10": float(p10), "p90": float(p90)}


def _unit(vectors: np.ndarray) -> Any:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
