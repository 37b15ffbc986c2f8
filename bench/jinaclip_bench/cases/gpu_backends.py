"""The backends of our sides on a GPU: every one that can run, or the one that was asked for."""

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
    """The backends of our sides, at least one.

    Args:
        towers: that are measured.
        device: "cuda" or "cuda:N".
        backend: of BACKENDS; None for every one that can run, with a sentence to `tell` for one that cannot.

    Raises:
        BackendMissing, EngineMismatch: what was asked for cannot run, or nothing can; says what is missing.
    """
    backends: list[Backend] = []
    problems = []
    for name in BACKENDS if backend is None else (backend,):
        try:
            found = choose_backend(bundle, towers, backend=name, device=device)
            if name != OnnxRuntimeCpu.name:  # there must be engines
                for tower in towers:
                    found.graph(bundle, tower, "fp16")
        except BackendError as error:
            if backend is not None:
                raise
            problems.append(f"{name} is left out: {error}")
        else:
            backends.append(found)
    if not backends:
        raise BackendMissing("; ".join(problems))
    for problem in problems:
        tell(problem)
    return tuple(backends)
