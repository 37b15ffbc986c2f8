"""Which backend, device and precision run the graphs of a bundle.

What is asked for is given or refused. "auto" takes, in this order, a TensorRT or TensorRT-RTX engine that was built for
the GPU that is here, ONNX Runtime on that GPU, ONNX Runtime on the CPU; and the fastest precision that has a passing
certificate there, else fp32.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinaclip.backends.base import Backend, GpuBackend
from jinaclip.backends.cuda.gpu import device_index, driver_problem, gpu
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu, OnnxRuntimeCuda
from jinaclip.backends.onnxruntime.cuda_provider import has_cuda_provider
from jinaclip.backends.tensorrt.backend import TensorRtBackend
from jinaclip.bundle.certificates import FORMAT_VERSION, note_name
from jinaclip.bundle.manifest import PRECISION_CLASS, TOWERS, Bundle
from jinaclip.errors import BackendError, BackendMissing, InputError

logger = logging.getLogger("jinaclip")

# Backends for GPUs, in the order in which "auto" tries them.
GPU_BACKENDS: dict[str, type[GpuBackend]] = {
    "tensorrt": TensorRtBackend,
    "tensorrt-rtx": TensorRtBackend,
    "onnxruntime": OnnxRuntimeCuda,
}
BACKENDS = ("auto", *sorted(GPU_BACKENDS))


PRECISIONS = ("auto", *PRECISION_CLASS)


# What "auto" considers before fp32, fastest first, by device. fp16 is no faster on a CPU, int8 has no GPU kernels here.
FASTER = {"cpu": ("int8",), "cuda": ("fp16",)}


def choose_backend(
    bundle: Bundle, towers: Sequence[str], *, backend: str = "auto", device: str = "auto",
    precision: Mapping[str, str] | None = None,
) -> Backend:  # fmt: skip
    """The backend that stands for what was asked.

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
    if backend not in ("auto", OnnxRuntimeCpu.name):  # one that runs on GPUs alone
        if device == "cpu":
            raise BackendMissing(f"{backend} runs on NVIDIA GPUs, not on device 'cpu'; use onnxruntime there")
        return GPU_BACKENDS[backend].on(backend, gpu(index))
    if device == "cpu":
        return OnnxRuntimeCpu()
    if device == "auto" and "int8" in [(precision or {}).get(tower) for tower in towers]:
        return OnnxRuntimeCpu("int8 graphs are made for CPUs")
    if device == "auto" and (problem := driver_problem()):
        # A warning only where the package for GPUs was installed on purpose.
        return on_cpu(problem) if has_cuda_provider() else OnnxRuntimeCpu(problem)
    found = gpu(index)
    problems: list[str] = []
    for name in GPU_BACKENDS if backend == "auto" else (backend,):
        fitting = GPU_BACKENDS[name].fitting(name, found, bundle, towers, precision or {})
        if isinstance(fitting, OnnxRuntimeCuda):
            reason = "asked for" if device != "auto" else fitting.reason
            return replace(fitting, reason="; ".join([reason, *problems]))
        if fitting is not None and not isinstance(fitting, str):
            return fitting
        problems += [fitting] if fitting else []
    problems = problems[-1:] + problems[:-1]  # ONNX Runtime's first: it is what every bundle could run on
    if device != "auto":
        raise BackendMissing("; ".join([f"device {device!r}: {problems[0]}", *problems[1:]]))
    return on_cpu("; ".join(problems))


def on_cpu(problem: str) -> Backend:
    """The CPU in place of a GPU that "auto" cannot use; says so once for each reason."""
    kind = re.sub(r"\d+", "", problem)  # free memory differs from time to time
    if kind not in _told:
        _told.add(kind)
        logger.warning("device='auto' takes the CPU: %s", problem)
    return OnnxRuntimeCpu(problem)


_told: set[str] = set()  # kinds of problem that were warned of


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


def choose_precision(bundle: Bundle, tower: str, backend: Backend) -> Choice:
    """The precision that "auto" stands for.

    Args:
        backend: what would run the graph. A certificate holds where its `facts` are the same: other kernels round
            differently.

    Raises:
        BackendError: the backend runs no fp32 graph, and nothing else is certified.
    """
    reason, lapsed = "the bundle has no faster graph", False
    facts, possible = backend.facts(), backend.precisions(bundle, tower)
    for precision in FASTER.get(backend.device, ()):
        if precision in possible:
            certificate = bundle.read_note(note_name(precision, facts))
            problem = _objection(certificate, bundle, tower, precision, backend)
            if problem is None:
                return Choice(precision, f"the {precision} certificate passed")
            reason = f"{precision}: {problem}"
            lapsed = _passed(certificate, tower)
    if "fp32" not in possible:
        raise BackendError(
            f"precision 'auto': {backend.name} runs no fp32 graph of the {tower} tower, and {reason}; ask for "
            "precision='fp16', or run `jinaclip certify` with this backend first"
        )
    return Choice("fp32", reason, lapsed)


def _passed(certificate: Mapping[str, Any] | None, tower: str) -> bool:
    """Whether it says so of this tower, of whatever graph on whatever machine."""
    towers = (certificate or {}).get("towers")
    measured = towers.get(tower) if isinstance(towers, dict) else None
    return isinstance(measured, dict) and measured.get("verdict") == "passed"


def _objection(
    certificate: Mapping[str, Any] | None, bundle: Bundle, tower: str, precision: str, backend: Backend
) -> str | None:
    """Why a certificate does not speak for this graph here; None if it does."""
    if certificate is None:
        return "no certificate"
    if certificate.get("format_version") != FORMAT_VERSION:
        return f"certificate has format version {certificate.get('format_version')!r:.40}, expected {FORMAT_VERSION}"
    session, towers = certificate.get("session"), certificate.get("towers")
    if not isinstance(session, dict) or not isinstance(towers, dict) or certificate.get("precision") != precision:
        return "certificate is not as the format says"
    for name, value in backend.facts().items():
        if session.get(name) != value:
            return f"certificate is of {name} {session.get(name)!r:.80}, this is {value!r}"
    measured = towers.get(tower)
    if not isinstance(measured, dict):
        return f"certificate does not cover the {tower} tower"
    if measured.get("graph") != backend.graph(bundle, tower, precision):
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
    by_tower: Mapping[str, str], bundle: Bundle, towers: Sequence[str], backend: Backend
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
                choice = choose_precision(bundle, tower, backend)
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
