"""ONNX Runtime sessions on the CPU."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.backends.base import Arrays, Names, keep_after_fork, require_open
from jinaclip.backends.cost import CPU_COST, RunCost
from jinaclip.backends.machine import cpu_features, cpu_model
from jinaclip.backends.onnxruntime.library import (
    first_line,
    import_onnxruntime,
    open_onnxruntime,
    session_options,
)
from jinaclip.errors import BackendError, BundleError


class OnnxRuntimeSession:
    """An ONNX Runtime session on the CPU.

    Args:
        path: the .onnx file. Its weights are in the same directory.
        threads: cores for one run. None uses `available_threads()`.
        prepared: key of the prepared graph, which is already optimised. None for the bundle's graph, which
            onnxruntime optimises when it is opened.
        cost: cost of a run of this graph.

    Raises:
        BackendMissing: onnxruntime is not installed.
        BundleError: onnxruntime cannot open the file.
    """

    backend = "onnxruntime"
    concurrency = 1

    def __init__(
        self, path: Path, *, threads: int | None = None, prepared: str | None = None, cost: RunCost = CPU_COST
    ) -> None:
        ort = import_onnxruntime()
        self.device = "cpu"
        self.prepared, self.cost = prepared, cost
        options = session_options(ort)
        if prepared is not None:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session, self.threads = open_onnxruntime(ort, path, options, threads)
        except BackendError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise BundleError(
                f"onnxruntime {ort.__version__} cannot open {path}: {first_line(error)}; "
                "check the bundle with `jinaclip verify`, or export it again"
            ) from error
        self._ort = ort
        self._process = os.getpid()
        keep_after_fork(self)

    def run(
        self, inputs: Arrays, *, outputs: Names = None, interruptible: bool = False, release_memory: bool = False
    ) -> dict[str, np.ndarray]:
        session = require_open(self._process, self._session)
        options = self._ort.RunOptions()
        if release_memory:  # otherwise the arena stays as large as the largest run so far
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        names = list(outputs or (output.name for output in session.get_outputs()))
        try:
            if interruptible and threading.current_thread() is threading.main_thread():
                values = _run_interruptibly(session, names, inputs, options)
            else:
                values = session.run(names, dict(inputs), options)
        except Exception as error:  # no common base class, as above
            raise BackendError(f"onnxruntime failed to run the graph: {first_line(error)}") from error
        return dict(zip(names, values, strict=True))

    def describe(self) -> dict[str, Any]:
        return {
            **onnxruntime_facts(),
            "graph": self.prepared or "standard",
            "providers": require_open(self._process, self._session).get_providers(),
            "threads": self.threads,
        }

    def close(self) -> None:
        if os.getpid() == self._process:
            self._session = None


def onnxruntime_facts() -> dict[str, str]:
    """The facts that determine a graph's numerical results on this CPU. See `Backend.facts`."""
    return {
        "backend": OnnxRuntimeSession.backend,
        "version": import_onnxruntime().__version__,
        "device": "cpu",
        "cpu": cpu_model(),
        "cpu_features": " ".join(cpu_features()),
    }


def _run_interruptibly(session: Any, names: list[str], inputs: Arrays, options: Any) -> Any:
    """Run in a helper thread. The main thread can then receive Ctrl-C, and the run ends after its current node."""
    with ThreadPoolExecutor(1, thread_name_prefix="jinaclip-run") as pool:
        future = pool.submit(session.run, names, dict(inputs), options)
        try:
            return future.result()
        except KeyboardInterrupt:
            options.terminate = True
            raise
