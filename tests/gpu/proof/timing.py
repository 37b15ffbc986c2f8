"""Times of sides in turn, A B C A B C …, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from jinaclip_bench.sides.torch_cuda import matmul_tflops


@dataclass
class Times:
    """Of one side.

    Attributes:
        wall: seconds of each call, from arrays of the host to arrays of the host.
        device: seconds that the device took for the tower in it; empty where that is not measured.
    """

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Milliseconds and the number of calls."""
        p10, p50, p90 = (float(value) * 1e3 for value in np.percentile(self.wall, (10, 50, 90)))
        facts: dict[str, Any] = {"ms": round(p50, 3), "p10": round(p10, 3), "p90": round(p90, 3)}
        if self.device:
            facts["device_ms"] = round(float(np.median(self.device)) * 1e3, 3)
        return facts | {"calls": len(self.wall)}


def in_turn(
    calls: Mapping[str, Callable[[], np.ndarray]], *, seconds: float, least: int = 5, most: int = 400,
    device: Mapping[str, Callable[[], float]] | None = None,
) -> dict[str, Times]:  # fmt: skip
    """Call every side in turn for so long, at least `least` times each; they have been called before.

    Args:
        device: by side, a function that returns the device's seconds since its last call.
    """
    times = {name: Times() for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() < end):
        for name, call in calls.items():
            take = (device or {}).get(name)
            if take is not None:
                take()
            start = time.perf_counter()
            call()
            times[name].wall.append(time.perf_counter() - start)
            if take is not None:
                times[name].device.append(take())
        rounds += 1
    return times


def product_rate(device: str) -> float | None:
    """TFLOP/s of a large float16 product on this GPU, now; None on a CPU."""
    return None if device == "cpu" else matmul_tflops(torch.cuda.current_device())


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rows of two arrays [N, D]."""
    wide = [x.astype(np.float64) for x in (a, b)]
    x, y = (values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12) for values in wide)
    found: np.ndarray = (x * y).sum(-1)
    return found
