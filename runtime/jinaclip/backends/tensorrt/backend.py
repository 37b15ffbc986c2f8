"""The TensorRT and TensorRT-RTX backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jinaclip.backends.base import Session, gpu_facts, require_precision
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.tensorrt.library import Library, load_library
from jinaclip.backends.tensorrt.plans import PRECISION, find_plan
from jinaclip.backends.tensorrt.session import TensorRTSession
from jinaclip.bundle.engines import engines_of
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError


@dataclass(frozen=True)
class TensorRtBackend:
    """TensorRT or TensorRT-RTX on an NVIDIA GPU. See jinaclip.backends.base.Backend.

    Attributes:
        name: "tensorrt" or "tensorrt-rtx".
        gpu: the GPU.
        library: the library that runs the engines.
        reason: why this backend was chosen.
    """

    name: str
    gpu: Gpu
    library: Library
    reason: str = "requested"
    device: ClassVar[str] = "cuda"

    @classmethod
    def on(cls, name: str, gpu: Gpu) -> TensorRtBackend:
        return cls(name, gpu, load_library(name))

    @classmethod
    def fitting(
        cls, name: str, gpu: Gpu, bundle: Bundle, towers: Sequence[str], precision: Mapping[str, str]
    ) -> TensorRtBackend | str | None:
        if any(precision.get(tower, "auto") not in ("auto", PRECISION) for tower in towers):
            return None
        if not all(any(True for _ in engines_of(bundle, tower, PRECISION, name)) for tower in towers):
            return None
        try:
            library = load_library(name)
            for tower in towers:
                find_plan(bundle, tower, library, gpu, hashes=False)
        except BackendError as error:
            return str(error)
        return cls(name, gpu, library, f"engines built for {gpu}")

    def facts(self) -> dict[str, Any]:
        return gpu_facts(self.name, self.library.version, self.gpu)

    def precisions(self, bundle: Bundle, tower: str) -> tuple[str, ...]:
        return tuple(precision for precision in bundle.tower(tower).graphs if precision == PRECISION)

    def open(self, bundle: Bundle, tower: str, precision: str, *, threads: int | None = None) -> tuple[Session, str]:
        require_precision(self, bundle, tower, precision)
        plan = find_plan(bundle, tower, self.library, self.gpu)
        pad = bundle.special_ids["pad"] if tower == "text" else 0
        kernels = plan.path.with_name(f"runtime-{self.gpu.sm}.cache")
        session = TensorRTSession(plan, gpu=self.gpu, library=self.library, pad=pad, cache=kernels)
        return session, f"engine {plan.key}"

    def graph(self, bundle: Bundle, tower: str, precision: str) -> str:
        plan = find_plan(bundle, tower, self.library, self.gpu, hashes=False)
        return f"{bundle.graph_identity(tower, precision)} {plan.key}"
