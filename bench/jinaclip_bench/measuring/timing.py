"""Time the sides of a case in turn, A B C A B C …, and compare their outputs.

If the machine slows down during a run, it slows down every side. The ratio of two sides in one round is therefore
meaningful, even if absolute times from different minutes are not comparable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jinaclip_bench.errors import BenchError

JINACLIP = "jinaclip"  # followed by a space and the precision; then a space and the backend on a GPU, or "served"
# Torch on a GPU: name of the side with concatenated texts without padding; suffixes of sides compiled by torch.compile,
# compiled and captured as a CUDA graph, and compiled with max-autotune.
UNPADDED = "torch-fp16-unpadded"
COMPILED, CAPTURED, AUTOTUNED = "-compiled", "-compiled-graph", "-max-autotune"
# After a call, onnxruntime's threads spin for about 20 ms and torch's for 5 ms (2 cores), and use cores that the next
# side needs. Without a pause, torch's barriers stalled for 200 ms.
SETTLE_S = 0.1
# Lowest cosine between sides by the precision of the weights. If two sides have a lower cosine than the less precise of
# the two allows, they do not compute the same. bfloat16 has 8 significant bits, and errors add up over 24 blocks.
LOWEST_COSINE = {"fp32": 0.99, "fp16": 0.99, "bf16": 0.95, "int8": 0.95}


def jinaclip_side(precision: str, suffix: str = "") -> str:
    """Name of jinaclip's side in a precision; the suffix is a backend on a GPU, or "served"."""
    return f"{JINACLIP} {precision} {suffix}".rstrip()


def is_jinaclip(side: str) -> bool:
    """Whether a side is jinaclip, in any precision."""
    return side.split()[0] == JINACLIP


def precision_of(side: str) -> str:
    """Precision of a side's weights, from its name ("torch-bf16", "jinaclip int8"). Names without one are fp32."""
    return next((name for name in LOWEST_COSINE if name in side), "fp32")


@dataclass(frozen=True)
class Requests:
    """Requests to a server in one sample.

    Attributes:
        seconds: duration of each request, from sending it until the response was read.
        clients_cpu_s, server_cpu_s: CPU time of the two processes, in seconds; None if the system does not provide it.
        batches: number of the server's runs by their number of items.
    """

    seconds: Sequence[float]
    clients_cpu_s: float
    server_cpu_s: float | None
    batches: Mapping[int, int]


@dataclass(frozen=True)
class Sample:
    """One timed call.

    Attributes:
        seconds: duration of the call.
        output: output of the call: vectors [rows, D], or pixels.
        peak_rss_mib, pss_mib: memory of the process, if the call ran in its own process.
        above_load_mib: increase of the peak resident set during the call.
        device_s: the GPU's time for the tower in seconds, if available.
        stages: seconds by stage, None for a stage that is not available; only if the case measures stages.
        requests: the requests, only if the call used a server.
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
    call: Callable[[], np.ndarray], *, warm_up: bool = False, device_seconds: Callable[[], float] | None = None
) -> Side:
    """Make a side of a call in this process.

    Args:
        call: function to time.
        warm_up: whether to call once untimed before each timed call, because an idle GPU lowers its clocks.
        device_seconds: function that returns the device's time of all calls since it was last called.
    """

    def side() -> Sample:
        if warm_up:
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
    """Take `rounds` samples of each side. Sample i of every side is from round i."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            time.sleep(SETTLE_S)
            samples[name].append(side())
        advance()
    return samples


def agreement(outputs: Mapping[str, np.ndarray]) -> dict[tuple[str, str], float]:
    """Compare the vectors of every side with those of each of jinaclip's sides.

    Returns:
        The lowest cosine over the rows, by (side, jinaclip's side), for each pair of different sides.

    Raises:
        BenchError: two sides return different vectors, so their times must not be compared.
    """
    pairs = [(side, base) for side in outputs for base in filter(is_jinaclip, outputs) if side != base]
    return {(side, base): _cosine(side, outputs[side], base, outputs[base]) for side, base in pairs}


def _cosine(side: str, vectors: np.ndarray, base: str, expected: np.ndarray) -> float:
    if vectors.shape != expected.shape:
        raise BenchError(f"{side} returns shape {vectors.shape}, {base} {expected.shape}; expected equal shapes")
    cosine = float((_unit(vectors) * _unit(expected)).sum(axis=-1).min())
    lowest = min(LOWEST_COSINE[precision_of(name)] for name in (side, base))
    if not cosine >= lowest:  # true for NaN too
        raise BenchError(
            f"{side} and {base} return different vectors (cosine {cosine:.4f}, expected at least {lowest}), so their "
            "times are not compared; check the bundle with `jinaclip verify`, and check that the checkpoint's "
            "config.json was not changed after the export"
        )
    return cosine


def summary(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99, min and max. Percentiles are interpolated linearly."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "min": min(values), "max": max(values)}


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """p50, p10 and p90 of times ÷ base over the rounds. A ratio above 1 means that the base is faster."""
    return spread([a / b for a, b in zip(times, base, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p10 and p90."""
    p10, p50, p90 = np.percentile(values, (10, 50, 90))
    return {"p50": float(p50), "p10": float(p10), "p90": float(p90)}


def _unit(vectors: np.ndarray) -> Any:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
