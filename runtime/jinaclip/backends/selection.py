"""Which backend, device and precision run the graphs of a bundle.

What is asked for is given or refused. "auto" takes, in this order, a TensorRT or TensorRT-RTX engine that was built for
the GPU that is here, ONNX Runtime on that GPU, ONNX Runtime on the CPU; and the fastest precision that has a passing
certificate there, else fp32.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinaclip.backends.base import Session
from jinaclip.backends.cuda.gpu import Gpu, device_index, driver_problem, gpu
from jinaclip.backends.onnxruntime.cpu import onnxruntime_facts
from jinaclip.backends.onnxruntime.cuda import onnxruntime_cuda_facts
from jinaclip.backends.onnxruntime.cuda_provider import cuda_problem, has_cuda_provider
from jinaclip.backends.onnxruntime.prepared_graphs import open_graph, running_graph
from jinaclip.backends.tensorrt.library import BACKENDS as TENSORRT_BACKENDS
from jinaclip.backends.tensorrt.library import Library, load_library
from jinaclip.backends.tensorrt.plans import PRECISION, find_plan, open_plan
from jinaclip.backends.tensorrt.session import tensorrt_facts
from jinaclip.bundle.certificates import FORMAT_VERSION, note_name
from jinaclip.bundle.engines import engines_of
from jinaclip.bundle.manifest import PRECISION_CLASS, TOWERS, Bundle
from jinaclip.errors import BackendError, BackendMissing, InputError

logger = logging.getLogger("jinaclip")
BACKENDS = ("auto", "onnxruntime", *TENSORRT_BACKENDS)
PRECISIONS = ("auto", *PRECISION_CLASS)
# What "auto" considers before fp32, fastest first, by device. fp16 is no faster on a CPU, int8 has no GPU kernels here.
FASTER = {"cpu": ("int8",), "cuda": ("fp16",)}


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


@dataclass(frozen=True)
class Choice:
    """What "auto" stands for.

    Attributes:
        precision: to be taken.
        reason: why it is that one.
        lapsed: a faster one is certified for this tower, but not for what would run here: vectors and provenance are
            others than where the certificate holds.
    """

    precision: str
    reason: str
    lapsed: bool = False


def choose_precision(bundle: Bundle, tower: str, place: Place) -> Choice:
    """The precision that "auto" stands for.

    Args:
        place: what would run the graph. A certificate holds where its `facts` are the same: other kernels round
            differently.

    Raises:
        BackendError: the place runs no fp32 graph, and nothing else is certified.
    """
    reason, lapsed = "the bundle has no faster graph", False
    facts, possible = place.facts(), place.precisions(bundle, tower)
    for precision in FASTER.get(place.device, ()):
        if precision in possible:
            certificate = bundle.read_note(note_name(precision, facts))
            problem = _objection(certificate, bundle, tower, precision, place)
            if problem is None:
                return Choice(precision, f"the {precision} certificate passed")
            reason = f"{precision}: {problem}"
            lapsed = _passed(certificate, tower)
    if "fp32" not in possible:
        raise BackendError(
            f"precision 'auto': {place.backend} runs no fp32 graph of the {tower} tower, and {reason}; ask for "
            "precision='fp16', or run `jinaclip certify` with this backend first"
        )
    return Choice("fp32", reason, lapsed)


def _passed(certificate: Mapping[str, Any] | None, tower: str) -> bool:
    """Whether it says so of this tower, of whatever graph on whatever machine."""
    towers = (certificate or {}).get("towers")
    measured = towers.get(tower) if isinstance(towers, dict) else None
    return isinstance(measured, dict) and measured.get("verdict") == "passed"


def _objection(
    certificate: Mapping[str, Any] | None, bundle: Bundle, tower: str, precision: str, place: Place
) -> str | None:
    """Why a certificate does not speak for this graph here; None if it does."""
    if certificate is None:
        return "no certificate"
    if certificate.get("format_version") != FORMAT_VERSION:
        return f"certificate has format version {certificate.get('format_version')!r:.40}, expected {FORMAT_VERSION}"
    session, towers = certificate.get("session"), certificate.get("towers")
    if not isinstance(session, dict) or not isinstance(towers, dict) or certificate.get("precision") != precision:
        return "certificate is not as the format says"
    for name, value in place.facts().items():
        if session.get(name) != value:
            return f"certificate is of {name} {session.get(name)!r:.80}, this is {value!r}"
    measured = towers.get(tower)
    if not isinstance(measured, dict):
        return f"certificate does not cover the {tower} tower"
    if measured.get("graph") != place.graph(bundle, tower, precision):
        return "certificate is of another graph; run `jinaclip certify` after `jinaclip build`"
    if measured.get("verdict") != "passed":
        return f"certificate's verdict is {measured.get('verdict')!r:.40}"
    return None


def asked_precision(asked: str | Mapping[str, str]) -> dict[str, str]:
    """What was asked for, by tower."""
    by_tower = dict.fromkeys(TOWERS, asked) if isinstance(asked, str) else dict(asked)
    if unknown := set(by_tower) - set(TOWERS):
        raise InputError(f"precision names the tower {sorted(unknown)[0]!r}, expected {' or '.join(TOWERS)}")
    for precision in by_tower.values():
        if precision not in PRECISIONS:
            raise InputError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    return by_tower


def resolve_precision(
    by_tower: Mapping[str, str], bundle: Bundle, towers: Sequence[str], place: Place
) -> tuple[dict[str, str], dict[str, str]]:
    """Precision of every tower of the bundle, and why it is that one.

    What is not loaded is resolved too, so that both towers give one provenance; only what is loaded must be there.
    """
    resolved: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for tower in (*towers, *(t for t in bundle.towers if t not in towers)):
        precision, reason = by_tower.get(tower, "auto"), "asked for"
        if precision == "auto":
            try:
                choice = choose_precision(bundle, tower, place)
            except BackendError:
                if tower in towers:
                    raise
                choice = Choice("fp32", "not loaded, and this backend has nothing certified of it")
            precision, reason = choice.precision, choice.reason
            if choice.lapsed and tower in towers:
                logger.warning(
                    "%s, %s tower: precision='auto' takes %s, with other vectors and another provenance: %s",
                    bundle.directory, tower, precision, reason,
                )  # fmt: skip
        if tower in towers:
            bundle.graph(tower, precision)
        elif precision not in bundle.tower(tower).graphs:
            precision, reason = "fp32", f"not loaded, and the bundle has no {precision} graph"
        resolved[tower], reasons[tower] = precision, reason
    return resolved, reasons
