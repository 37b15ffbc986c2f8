"""What runs the graphs of a bundle: which backend on which device, and the session that it opens.

What is asked for is given or refused. "auto" takes, in this order, a TensorRT or TensorRT-RTX engine that was built for
the GPU that is here, ONNX Runtime on that GPU, ONNX Runtime on the CPU.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinaclip.bundle import Bundle
from jinaclip.cuda_provider import cuda_problem, has_cuda_provider
from jinaclip.engine_store import engines_of
from jinaclip.errors import BackendError, BackendMissing, InputError
from jinaclip.gpu import Gpu, device_index, driver_problem, gpu
from jinaclip.onnxruntime_cuda import onnxruntime_cuda_facts
from jinaclip.plans import PRECISION, find_plan, open_plan
from jinaclip.prepared import open_graph, running_graph
from jinaclip.sessions import Session, onnxruntime_facts
from jinaclip.tensorrt_library import BACKENDS as TENSORRT_BACKENDS
from jinaclip.tensorrt_library import Library, load_library
from jinaclip.tensorrt_session import tensorrt_facts

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "onnxruntime", *TENSORRT_BACKENDS)


@dataclass(frozen=True)
class Place:
    """A backend on a device.

    Attributes:
        backend: of BACKENDS, not "auto".
        gpu: the device; None for the CPU.
        library: of a TensorRT backend.
        reason: why it is this one, in words.
    """

    backend: str
    gpu: Gpu | None = None
    library: Library | None = None
    reason: str = "asked for"

    @property
    def device(self) -> str:
        """ "cpu" or "cuda", for certificates: whichever GPU of its kind."""
        return "cpu" if self.gpu is None else "cuda"

    def facts(self) -> dict[str, Any]:
        """What decides a graph's numbers here, known before one is opened: part of every session's `describe()`."""
        if self.gpu is None:
            return onnxruntime_facts()
        return onnxruntime_cuda_facts(self.gpu) if self.library is None else tensorrt_facts(self.library, self.gpu)

    def precisions(self, bundle: Bundle, tower: str) -> tuple[str, ...]:
        """What it can run of a tower: TensorRT engines are made of fp16 graphs, int8 graphs for CPUs."""
        graphs = tuple(bundle.tower(tower).graphs)
        if self.gpu is None:
            return graphs
        return tuple(p for p in graphs if p == PRECISION or (self.library is None and p != "int8"))

    def open(self, bundle: Bundle, tower: str, precision: str, *, threads: int | None = None) -> tuple[Session, str]:
        """A session of a tower, and which graph or engine it is, in words.

        Raises:
            BundleError: the bundle lacks the precision.
            BackendMissing, EngineMismatch: there is no engine that fits; says how to build one.
        """
        bundle.graph(tower, precision)
        if precision not in (possible := self.precisions(bundle, tower)):
            raise BackendMissing(
                f"{self.backend} on {self.device} runs {' and '.join(possible) or 'nothing'} of this bundle's {tower} "
                f"tower, not {precision}: engines are made of fp16 graphs, int8 graphs for CPUs"
            )
        if self.library is None or self.gpu is None:
            return open_graph(bundle, tower, precision, gpu=self.gpu, threads=threads)
        session = open_plan(bundle, tower, self.library, self.gpu)
        return session, f"engine {session.key}"

    def graph(self, bundle: Bundle, tower: str, precision: str) -> str:
        """Identity of what would be opened: the bundle's graph, and what was made of it."""
        if self.library is None or self.gpu is None:
            return running_graph(bundle, tower, precision, self.gpu)
        plan = find_plan(bundle, tower, self.library, self.gpu, hashes=False)
        return f"{bundle.graph_identity(tower, precision)} {plan.key}"


def choose_place(
    bundle: Bundle, towers: Sequence[str], *, backend: str = "auto", device: str = "auto",
    precision: Mapping[str, str] | None = None,
) -> Place:  # fmt: skip
    """The backend and device that stand for what was asked.

    Args:
        towers: that will be opened.
        backend: of BACKENDS.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: by tower, what was asked for; "auto" or a missing one leaves it open.

    Raises:
        BackendMissing: it is not there; says what is missing.
        InputError: backend or device is none of these.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    index = 0 if device in ("auto", "cpu") else device_index(device)
    if backend in TENSORRT_BACKENDS:
        if device == "cpu":
            raise BackendMissing(f"{backend} runs on NVIDIA GPUs, not on device 'cpu'; use onnxruntime there")
        return Place(backend, gpu(index), load_library(backend))
    if device == "cpu":
        return Place("onnxruntime")
    if device == "auto" and "int8" in [(precision or {}).get(tower) for tower in towers]:
        return Place("onnxruntime", reason="int8 graphs are made for CPUs")
    if device == "auto" and (problem := driver_problem()):
        # A warning only where the package for GPUs was installed on purpose.
        return on_cpu(problem) if has_cuda_provider() else Place("onnxruntime", reason=problem)
    found = gpu(index)
    refused = []
    if backend == "auto":
        for name in TENSORRT_BACKENDS:
            place, problem = _engines(bundle, towers, name, found, precision or {})
            if place is not None:
                return place
            refused += [problem] if problem else []
    problem = cuda_problem(found)
    if problem is None:
        chosen = "asked for" if device != "auto" else f"there is {found}"
        return Place("onnxruntime", found, reason="; ".join([chosen, *refused]))
    if device != "auto":
        raise BackendMissing("; ".join([f"device {device!r}: {problem}", *refused]))
    return on_cpu("; ".join([problem, *refused]))


def on_cpu(problem: str) -> Place:
    """The CPU in place of a GPU that "auto" cannot use; says so once for each reason."""
    kind = re.sub(r"\d+", "", problem)  # free memory differs from time to time
    if kind not in _told:
        _told.add(kind)
        logger.warning("device='auto' takes the CPU: %s", problem)
    return Place("onnxruntime", reason=problem)


_told: set[str] = set()  # kinds of problem that were warned of


def _engines(
    bundle: Bundle, towers: Sequence[str], backend: str, device: Gpu, precision: Mapping[str, str]
) -> tuple[Place | None, str | None]:
    """The place of engines of all towers that fit this GPU; or None, and why not where there are some."""
    if any(precision.get(tower, "auto") not in ("auto", PRECISION) for tower in towers):
        return None, None
    if not all(any(True for _ in engines_of(bundle, tower, PRECISION, backend)) for tower in towers):
        return None, None
    try:
        library = load_library(backend)
        for tower in towers:
            find_plan(bundle, tower, library, device, hashes=False)
    except BackendError as error:
        return None, str(error)
    return Place(backend, device, library, f"engines built for {device}"), None
