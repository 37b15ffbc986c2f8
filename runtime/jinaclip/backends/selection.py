"""Selection of the backend, the device and the precision.

An explicit choice is used or refused, never replaced. "auto" tries, in this order: TensorRT and TensorRT-RTX engines
built for this machine's GPU, ONNX Runtime on the GPU, ONNX Runtime on the CPU. It then uses the fastest precision that
has a passing certificate for that backend, and fp32 otherwise.
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

# GPU backends, in the order in which "auto" tries them.
GPU_BACKENDS: dict[str, type[GpuBackend]] = {
    "tensorrt": TensorRtBackend,
    "tensorrt-rtx": TensorRtBackend,
    "onnxruntime": OnnxRuntimeCuda,
}
BACKENDS = ("auto", *sorted(GPU_BACKENDS))
PRECISIONS = ("auto", *PRECISION_CLASS)
# Precisions that "auto" tries before fp32, fastest first, by device. fp16 is not faster on CPUs; int8 does not run on
# GPUs.
FASTER = {"cpu": ("int8",), "cuda": ("fp16",)}
Asked = Mapping[str, str]  # the requested precision by tower
_ANY: Asked = {}


def choose_backend(
    bundle: Bundle, towers: Sequence[str], *, backend: str = "auto", device: str = "auto", precision: Asked = _ANY
) -> Backend:
    """Choose the backend and the device.

    Args:
        bundle: the bundle.
        towers: towers that will be opened.
        backend: one of BACKENDS.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: requested precision by tower. A tower that is "auto" or missing accepts any precision.

    Raises:
        BackendMissing: the requested backend or device is not available; the message says what is missing.
        InputError: backend or device has an unknown value.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    index = 0 if device in ("auto", "cpu") else device_index(device)
    if backend not in ("auto", OnnxRuntimeCpu.name):  # runs on GPUs only
        if device == "cpu":
            raise BackendMissing(f"{backend} runs on NVIDIA GPUs, not on device 'cpu'; use backend 'onnxruntime'")
        return GPU_BACKENDS[backend].on(backend, gpu(index))
    if device == "cpu":
        return OnnxRuntimeCpu()
    if device == "auto" and "int8" in [precision.get(tower) for tower in towers]:
        return OnnxRuntimeCpu("int8 graphs run on CPUs only")
    if device == "auto" and (problem := driver_problem()):
        # Warn only if the package for GPUs is installed.
        return on_cpu(problem) if has_cuda_provider() else OnnxRuntimeCpu(problem)
    found = gpu(index)
    problems: list[str] = []
    for name in GPU_BACKENDS if backend == "auto" else (backend,):
        fitting = GPU_BACKENDS[name].fitting(name, found, bundle, towers, precision)
        if isinstance(fitting, OnnxRuntimeCuda):
            reason = "requested" if device != "auto" else fitting.reason
            return replace(fitting, reason="; ".join([reason, *problems]))
        if fitting is not None and not isinstance(fitting, str):
            return fitting
        problems += [fitting] if fitting else []
    problems = problems[-1:] + problems[:-1]  # ONNX Runtime's first, because it can run every bundle
    if device != "auto":
        raise BackendMissing("; ".join([f"device {device!r}: {problems[0]}", *problems[1:]]))
    return on_cpu("; ".join(problems))


def on_cpu(problem: str) -> Backend:
    """Fall back to the CPU if "auto" cannot use the GPU. Logs a warning once per reason."""
    kind = re.sub(r"\d+", "", problem)  # numbers, such as the free memory, vary
    if kind not in _told:
        _told.add(kind)
        logger.warning("device='auto' uses the CPU: %s", problem)
    return OnnxRuntimeCpu(problem)


_told: set[str] = set()  # reasons that were logged


@dataclass(frozen=True)
class Choice:
    """The precision that "auto" chose.

    Attributes:
        precision: the precision.
        reason: why it was chosen.
        lapsed: True if a faster precision has a certificate for this tower, but for another graph, CPU or library
            version. Vectors and provenance then differ from those of a machine for which the certificate is valid.
    """

    precision: str
    reason: str
    lapsed: bool = False


def choose_precision(bundle: Bundle, tower: str, backend: Backend) -> Choice:
    """Choose the precision for "auto".

    Args:
        bundle: the bundle.
        tower: name of the tower.
        backend: the backend that will run the graph. A certificate is valid only if its `facts` are the same, because
            other kernels have other rounding errors.

    Raises:
        BackendError: the backend cannot run fp32, and no other precision is certified.
    """
    reason, lapsed = "the bundle has no faster graph", False
    facts, possible = backend.facts(), backend.precisions(bundle, tower)
    for precision in FASTER[backend.device]:
        if precision in possible:
            certificate = bundle.read_note(note_name(precision, facts))
            problem = _objection(certificate, bundle, tower, precision, backend)
            if problem is None:
                return Choice(precision, f"the {precision} certificate passed")
            reason = f"{precision}: {problem}"
            lapsed = _passed(certificate, tower)
    if "fp32" not in possible:
        raise BackendError(
            f"precision 'auto': {backend.name} runs no fp32 graph of the {tower} tower, and {reason}; pass "
            "precision='fp16', or run `jinaclip certify` with this backend first"
        )
    return Choice("fp32", reason, lapsed)


def _passed(certificate: Mapping[str, Any] | None, tower: str) -> bool:
    """Whether a certificate has a passing verdict for this tower, for any graph and machine."""
    towers = (certificate or {}).get("towers")
    measured = towers.get(tower) if isinstance(towers, dict) else None
    return isinstance(measured, dict) and measured.get("verdict") == "passed"


def _objection(
    certificate: Mapping[str, Any] | None, bundle: Bundle, tower: str, precision: str, backend: Backend
) -> str | None:
    """Why a certificate is not valid for this graph on this machine; None if it is valid."""
    if certificate is None:
        return "no certificate"
    if certificate.get("format_version") != FORMAT_VERSION:
        return f"certificate has format version {certificate.get('format_version')!r:.40}, expected {FORMAT_VERSION}"
    session, towers = certificate.get("session"), certificate.get("towers")
    if not isinstance(session, dict) or not isinstance(towers, dict) or certificate.get("precision") != precision:
        return "certificate does not follow the format"
    for name, value in backend.facts().items():
        if session.get(name) != value:
            return f"certificate is for {name} {session.get(name)!r:.80}, found {value!r}"
    measured = towers.get(tower)
    if not isinstance(measured, dict):
        return f"certificate does not cover the {tower} tower"
    if measured.get("graph") != backend.graph(bundle, tower, precision):
        return "certificate is for another graph; run `jinaclip certify` after `jinaclip build`"
    if measured.get("verdict") != "passed":
        return f"certificate's verdict is {measured.get('verdict')!r:.40}, expected 'passed'"
    return None


def asked_precision(asked: str | Mapping[str, str]) -> dict[str, str]:
    """The requested precision by tower.

    Raises:
        InputError: a tower or a precision is unknown.
    """
    by_tower = dict.fromkeys(TOWERS, asked) if isinstance(asked, str) else dict(asked)
    if unknown := set(by_tower) - set(TOWERS):
        raise InputError(f"precision is given for tower {sorted(unknown)[0]!r}, expected {' or '.join(TOWERS)}")
    for precision in by_tower.values():
        if precision not in PRECISIONS:
            raise InputError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    return by_tower


def resolve_precision(
    by_tower: Mapping[str, str], bundle: Bundle, towers: Sequence[str], backend: Backend
) -> tuple[dict[str, str], dict[str, str]]:
    """Resolve the precision of every tower of the bundle.

    Towers that are not loaded are included, so that the provenance does not depend on which towers are loaded. Only
    loaded towers need a graph in their precision.

    Args:
        by_tower: requested precision by tower, as `asked_precision` returns it.
        bundle: the bundle.
        towers: towers that are loaded.
        backend: the backend that runs them.

    Returns:
        The precision and the reason for it, both by tower.

    Raises:
        BundleError: the bundle does not have a requested precision.
        BackendError: as for `choose_precision`.
    """
    resolved: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for tower in (*towers, *(t for t in bundle.towers if t not in towers)):
        choice = Choice(by_tower.get(tower, "auto"), "requested")
        if choice.precision == "auto":
            try:
                choice = choose_precision(bundle, tower, backend)
            except BackendError:
                if tower in towers:
                    raise
                choice = Choice("fp32", "not loaded, and no precision is certified for this backend")
        if tower in towers:
            if choice.lapsed:
                effect = f"uses {choice.precision}, which gives other vectors and another provenance"
                logger.warning("%s, %s tower: precision='auto' %s: %s", bundle.directory, tower, effect, choice.reason)
            bundle.graph(tower, choice.precision)
        elif choice.precision not in bundle.tower(tower).graphs:
            choice = Choice("fp32", f"not loaded, and the bundle has no {choice.precision} graph")
        resolved[tower], reasons[tower] = choice.precision, choice.reason
    return resolved, reasons
