"""Select the backends of jinaclip's sides on a GPU: every usable backend, or the requested one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from jinaclip.backends.base import Backend
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu
from jinaclip.backends.selection import GPU_BACKENDS, choose_backend
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError, BackendMissing

logger = logging.getLogger("jinaclip")


def backends_on_gpu(bundle: Bundle, towers: Sequence[str], device: str, backend: str | None) -> tuple[Backend, ...]:
    """The backends of jinaclip's sides, at least one. A message is logged for each backend that is skipped.

    Args:
        bundle: the bundle to measure.
        towers: towers to measure.
        device: "cuda" or "cuda:N".
        backend: one of GPU_BACKENDS, or None for every usable backend.

    Raises:
        BackendMissing, EngineMismatch: the requested backend is not usable, or no backend is. The message names what is
            missing.
    """
    backends: list[Backend] = []
    problems = []
    for name in sorted(GPU_BACKENDS) if backend is None else (backend,):
        try:
            usable = choose_backend(bundle, towers, backend=name, device=device)
            if name != OnnxRuntimeCpu.name:  # check that the engines exist
                for tower in towers:
                    usable.graph(bundle, tower, "fp16")
            backends.append(usable)
        except BackendError as error:
            if backend is not None:
                raise
            problems.append(f"{name} is skipped: {error}")
    if not backends:
        raise BackendMissing("; ".join(problems))
    for problem in problems:
        logger.warning(problem)
    return tuple(backends)
