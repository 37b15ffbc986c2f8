"""Select the backends of jinaclip's sides on a GPU: every usable backend, or the requested one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jinaclip.backends.base import Backend
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu
from jinaclip.backends.selection import BACKENDS as KNOWN
from jinaclip.backends.selection import choose_backend
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError, BackendMissing

BACKENDS = KNOWN[1:]  # without "auto"


def backends_on_gpu(
    bundle: Bundle, towers: Sequence[str], device: str, backend: str | None, *, tell: Callable[[str], None]
) -> tuple[Backend, ...]:
    """The backends of jinaclip's sides, at least one.

    Args:
        bundle: the bundle to measure.
        towers: towers to measure.
        device: "cuda" or "cuda:N".
        backend: one of BACKENDS, or None for every usable backend.
        tell: function that receives a message for each backend that is skipped.

    Raises:
        BackendMissing, EngineMismatch: the requested backend is not usable, or no backend is. The message names what is
            missing.
    """
    backends: list[Backend] = []
    problems = []
    for name in BACKENDS if backend is None else (backend,):
        try:
            found = choose_backend(bundle, towers, backend=name, device=device)
            if name != OnnxRuntimeCpu.name:  # check that the engines exist
                for tower in towers:
                    found.graph(bundle, tower, "fp16")
        except BackendError as error:
            if backend is not None:
                raise
            problems.append(f"{name} is skipped: {error}")
        else:
            backends.append(found)
    if not backends:
        raise BackendMissing("; ".join(problems))
    for problem in problems:
        tell(problem)
    return tuple(backends)
