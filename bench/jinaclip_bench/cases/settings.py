"""Settings of a run, and a case that is ready to be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jinaclip.backends.base import Backend
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu
from jinaclip.bundle.manifest import Bundle
from jinaclip.model import ClipModel
from jinaclip_bench.cases.table import Case
from jinaclip_bench.measuring.timing import Side, jinaclip_side

if TYPE_CHECKING:
    from jinaclip_export.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class BenchSettings:
    """Settings of a run.

    Attributes:
        bundle: the bundle to measure.
        checkpoint: the bundle's checkpoint, to measure torch; None to measure only jinaclip.
        threads: number of cores for every side.
        repeats: number of timed calls of each side.
        precisions: precisions of the bundle's graphs. Each is a side, on every backend that can run it.
        fused: path of the graph of both towers, if it is measured (jinaclip_bench.sides.fused_onnx).
        suite: name of the suite, for the records; None if cases were given by name.
        backends: backends of jinaclip's sides: one on the CPU, or one or more on the same GPU.
        max_autotune: on a GPU, whether to measure torch.compile's max-autotune on images.
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
        """The GPU to measure; None for the CPU."""
        return self.backends[0].gpu

    def jinaclip_sides(self, tower: str) -> Iterator[tuple[str, Backend, str]]:
        """jinaclip's sides: name, backend, precision."""
        for backend in self.backends:
            for precision in self.precisions:
                if backend.gpu is None:
                    yield jinaclip_side(precision), backend, precision
                elif precision in backend.precisions(self.bundle, tower):
                    yield jinaclip_side(precision, backend.name), backend, precision

    def open_model(self, tower: str, backend: Backend, precision: str) -> ClipModel:
        """Open one tower of the bundle. The caller closes the model."""
        device = "cpu" if backend.gpu is None else f"cuda:{backend.gpu.index}"
        open_on = partial(ClipModel, backend=backend.name, device=device, threads=self.threads)
        return open_on(self.bundle.directory, towers=(tower,), precision={tower: precision})


@dataclass(frozen=True)
class OpenCase:
    """A case that is ready to be measured.

    Attributes:
        sides: the sides by name, jinaclip's first.
        shape: shape of the input.
        tokens: number of tokens in a call, without padding; None for images.
        burn_in: number of untimed calls of each side before the timed calls.
        threads: number of threads that a call uses; None for those of the settings.
        steady: whether items per second is meaningful; False if the time includes the start of a process.
        flops: floating-point operations of a call; None if they are not counted.
        matmul_tflops: function that measures the GPU's rate for a large float16 matrix product, in TFLOP/s; None on a
            CPU.
        first_calls: duration of the first call of a new session by side, in seconds, if it was timed.
    """

    sides: Mapping[str, Side]
    shape: tuple[int, ...]
    tokens: int | None
    burn_in: int = 3
    threads: int | None = None
    steady: bool = True
    flops: int | None = None
    matmul_tflops: Callable[[], float] | None = None
    first_calls: Mapping[str, float] = field(default_factory=dict)


# ids [B, T] or pixels uint8 [B, S, S, 3] -> unit vectors float32 [B, D]
Embed = Callable[[np.ndarray], np.ndarray]
Kind = Callable[[Case, BenchSettings, Mapping[str, Embed]], AbstractContextManager[OpenCase]]
