"""What a run is asked for, and what a case becomes once it is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jinaclip.backends.base import Backend
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu
from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.cases.table import Case
from jinaclip_bench.measuring.timing import Side, ours

if TYPE_CHECKING:
    from jinaclip_export.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run.

    Attributes:
        checkpoint: of the bundle; without it there is nothing to compare with.
        precisions: of the bundle's graphs: one side of ours for each, in every place that can run it.
        fused: the graph of both towers, where it is measured (jinaclip_bench.sides.fused_onnx).
        suite: for the records; None where cases were named one by one.
        backends: of our sides: one on the CPU, or one or several on one GPU.
        max_autotune: on a GPU, torch also runs images with products that were chosen by timing.
    """

    bundle: Bundle
    checkpoint: Checkpoint | None
    threads: int
    repeats: int
    precisions: tuple[str, ...] = ("fp32",)
    fused: Path | None = None
    suite: str | None = None
    backends: tuple[Backend, ...] = (OnnxRuntimeCpu(),)
    max_autotune: bool = False

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that is measured; None for the CPU."""
        return self.backends[0].gpu

    def ours(self, tower: str) -> Iterator[tuple[str, Backend, str]]:
        """Our sides: name, backend, precision."""
        for backend in self.backends:
            for precision in self.precisions:
                if backend.gpu is None:
                    yield ours(precision), backend, precision
                elif precision in backend.precisions(self.bundle, tower):
                    yield ours(precision, backend.name), backend, precision


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
        flops: floating-point operations that a call asks for; None where they are not counted.
        matmul_tflops: measures what the GPU reaches with a large product of float16 matrices; None on a CPU.
        first_calls: by side, seconds of the first call of its new session, where that was timed.
    """

    sides: Mapping[str, Side]
    shape: tuple[int, ...]
    tokens: int | None
    threads: int
    rounds: int
    burn_in: int = 3
    steady: bool = True
    flops: int | None = None
    matmul_tflops: Callable[[], float] | None = None
    first_calls: Mapping[str, float] = field(default_factory=dict)


# ids [B, T] or pixels uint8 [B, S, S, 3] -> unit vectors float32 [B, D]
Embed = Callable[[np.ndarray], np.ndarray]
Kind = Callable[[Case, Settings, Mapping[str, Embed]], AbstractContextManager[Opened]]


def feed(bundle: Bundle, tower: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Ids or pixels as the graph of a tower takes them."""
    return {bundle.tower(tower).input_name: bundle.image_input(values) if tower == "image" else values}
