"""The ONNX Runtime backends, for the CPU and for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jinaclip.backends.base import Session, gpu_facts, require_precision
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.onnxruntime.cpu import OnnxRuntimeSession, onnxruntime_facts
from jinaclip.backends.onnxruntime.cuda import OnnxRuntimeCudaSession
from jinaclip.backends.onnxruntime.cuda_operators import operators_for
from jinaclip.backends.onnxruntime.cuda_provider import cuda_problem
from jinaclip.backends.onnxruntime.library import import_onnxruntime
from jinaclip.backends.onnxruntime.prepared_graphs import Prepared, find_prepared
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
        prepared, reason = find_prepared(bundle, tower, precision)
        if prepared is None:
            return OnnxRuntimeSession(bundle.graph(tower, precision), threads=threads), reason
        session = OnnxRuntimeSession(prepared.path, threads=threads, prepared=prepared.key, cost=prepared.cost)
        return session, reason

    def graph(self, bundle: Bundle, tower: str, precision: str) -> str:
        return _identity(bundle, tower, precision, find_prepared(bundle, tower, precision)[0])


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
        return gpu_facts(self.name, import_onnxruntime().__version__, self.gpu)

    def precisions(self, bundle: Bundle, tower: str) -> tuple[str, ...]:
        return tuple(precision for precision in bundle.tower(tower).graphs if precision != "int8")

    def open(self, bundle: Bundle, tower: str, precision: str, *, threads: int | None = None) -> tuple[Session, str]:
        require_precision(self, bundle, tower, precision)
        library = operators_for(self.gpu)
        prepared, reason = find_prepared(bundle, tower, precision, self.device, operators=library is not None)
        pad = bundle.special_ids["pad"] if tower == "text" else 0
        if prepared is None:
            return OnnxRuntimeCudaSession(bundle.graph(tower, precision), gpu=self.gpu, pad=pad), reason
        key, operators = prepared.key, library if prepared.operators else None
        return OnnxRuntimeCudaSession(prepared.path, gpu=self.gpu, prepared=key, pad=pad, operators=operators), reason

    def graph(self, bundle: Bundle, tower: str, precision: str) -> str:
        operators = operators_for(self.gpu) is not None
        prepared, _ = find_prepared(bundle, tower, precision, self.device, operators=operators)
        return _identity(bundle, tower, precision, prepared)


def _identity(bundle: Bundle, tower: str, precision: str, prepared: Prepared | None) -> str:
    """The identity of the bundle's graph and, if there is one, the key of the prepared graph."""
    identity = bundle.graph_identity(tower, precision)
    return identity if prepared is None else f"{identity} {prepared.key}"
