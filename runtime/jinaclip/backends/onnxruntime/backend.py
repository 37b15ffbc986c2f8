"""The ONNX Runtime backends, for the CPU and for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jinaclip.backends.base import Session, require_precision
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.onnxruntime.cpu import onnxruntime_facts
from jinaclip.backends.onnxruntime.cuda import onnxruntime_cuda_facts
from jinaclip.backends.onnxruntime.cuda_provider import cuda_problem
from jinaclip.backends.onnxruntime.prepared_graphs import open_graph, running_graph
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendMissing

NAME = "onnxruntime"


@dataclass(frozen=True)
class OnnxRuntimeCpu:
    """ONNX Runtime on the CPU. See jinaclip.backends.base.Backend."""

    reason: str = "requested"
    name: ClassVar[str] = NAME
    device: ClassVar[str] = "cpu"
    gpu: ClassVar[Gpu | None] = None

    def facts(self) -> dict[str, Any]:
        return onnxruntime_facts()

    def precisions(self, bundle: Bundle, tower: str) -> tuple[str, ...]:
        return tuple(bundle.tower(tower).graphs)

    def open(self, bundle: Bundle, tower: str, precision: str, *, threads: int | None = None) -> tuple[Session, str]:
        require_precision(self, bundle, tower, precision)
        return open_graph(bundle, tower, precision, threads=threads)

    def graph(self, bundle: Bundle, tower: str, precision: str) -> str:
        return running_graph(bundle, tower, precision)


@dataclass(frozen=True)
class OnnxRuntimeCuda:
    """ONNX Runtime on an NVIDIA GPU. See jinaclip.backends.base.Backend."""

    gpu: Gpu
    reason: str = "requested"
    name: ClassVar[str] = NAME
    device: ClassVar[str] = "cuda"

    @classmethod
    def on(cls, name: str, gpu: Gpu) -> OnnxRuntimeCuda:
        if problem := cuda_problem(gpu):
            raise BackendMissing(problem)
        return cls(gpu)

    @classmethod
    def fitting(
        cls, name: str, gpu: Gpu, bundle: Bundle, towers: Sequence[str], precision: Mapping[str, str]
    ) -> OnnxRuntimeCuda | str | None:
        return cuda_problem(gpu) or cls(gpu, f"found {gpu}")

    def facts(self) -> dict[str, Any]:
        return onnxruntime_cuda_facts(self.gpu)

    def precisions(self, bundle: Bundle, tower: str) -> tuple[str, ...]:
        return tuple(precision for precision in bundle.tower(tower).graphs if precision != "int8")

    def open(self, bundle: Bundle, tower: str, precision: str, *, threads: int | None = None) -> tuple[Session, str]:
        require_precision(self, bundle, tower, precision)
        return open_graph(bundle, tower, precision, gpu=self.gpu)

    def graph(self, bundle: Bundle, tower: str, precision: str) -> str:
        return running_graph(bundle, tower, precision, self.gpu)
