"""The protocols of backends and sessions, and checks that they share.

A session runs one graph with one backend on one device. A request that cannot be met is refused: there is no fallback
to another backend, device or precision.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from jinaclip.backends.cost import RunCost
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError, BackendMissing

Arrays = Mapping[str, np.ndarray]
Names = Sequence[str] | None
T = TypeVar("T")


class Session(Protocol):
    """A graph that is ready to run. Safe to call from several threads at once."""

    backend: str
    device: str
    threads: int
    concurrency: int  # number of runs that should be requested at the same time for the best throughput
    cost: RunCost

    def run(
        self, inputs: Arrays, *, outputs: Names = None, interruptible: bool = False, release_memory: bool = False
    ) -> dict[str, np.ndarray]:
        """Run the graph.

        Args:
            inputs: input arrays by name.
            outputs: names of the outputs to return. None returns all.
            interruptible: allow Ctrl-C to end a long run in the main thread.
            release_memory: return the run's memory to the system after the run, instead of keeping it for the next.

        Returns:
            The outputs by name.
        """

    def describe(self) -> dict[str, Any]:
        """The session's backend, device and graph, for info() and certificates, as JSON-compatible values."""

    def close(self) -> None:
        """Free the graph. Running it afterwards raises an error."""


class Backend(Protocol):
    """A library on a device, which runs the graphs of a bundle. To add a backend, write a class in a file of its own
    and register it in selection.py.
    """

    @property
    def name(self) -> str:
        """The name that `ClipModel(backend=…)` accepts."""

    @property
    def device(self) -> str:
        """ "cpu" or "cuda", without the number of the GPU. Part of a certificate's file name."""

    @property
    def gpu(self) -> Gpu | None:
        """The GPU; None for the CPU."""

    @property
    def reason(self) -> str:
        """Why this backend was chosen, for `info()`."""

    def facts(self) -> dict[str, Any]:
        """The facts that determine a graph's numerical results, such as the versions of the library and the driver.

        They are known before a graph is opened and are part of every session's `describe()`.
        """

    def precisions(self, bundle: Bundle, tower: str) -> tuple[str, ...]:
        """The precisions of the bundle's graphs of a tower that this backend can run."""

    def open(self, bundle: Bundle, tower: str, precision: str, *, threads: int | None = None) -> tuple[Session, str]:
        """Open a tower.

        Args:
            bundle: the bundle.
            tower: name of the tower.
            precision: precision of the graph.
            threads: cores for one run on the CPU. None uses all that this process may use.

        Returns:
            The session, and a description of the graph or engine that it uses.

        Raises:
            BundleError: the bundle does not have the precision.
            BackendMissing, EngineMismatch: there is no matching engine; the message says how to build one.
        """

    def graph(self, bundle: Bundle, tower: str, precision: str) -> str:
        """Identity of the graph that `open` would use: that of the bundle's graph and of the engine made from it."""


class GpuBackend(Backend, Protocol):
    """A backend for GPUs, with the constructors that selection.py uses."""

    @classmethod
    def on(cls, name: str, gpu: Gpu) -> Self:
        """Construct the backend that was requested by name.

        Raises:
            BackendMissing: it cannot be used on this machine; the message says what is missing.
        """

    @classmethod
    def fitting(
        cls, name: str, gpu: Gpu, bundle: Bundle, towers: Sequence[str], precision: Mapping[str, str]
    ) -> Self | str | None:
        """Construct the backend for "auto", if it can run these towers.

        Args:
            name: name of the backend.
            gpu: the GPU.
            bundle: the bundle.
            towers: towers that will be opened.
            precision: requested precision by tower. A tower that is "auto" or missing accepts any precision.

        Returns:
            The backend, or a message that says why it cannot run the towers, or None if the bundle has no engines
            for it.
        """


def gpu_facts(backend: str, version: str, gpu: Gpu) -> dict[str, Any]:
    """The facts of a backend on a GPU, with the version of its library. See `Backend.facts`."""
    return {"backend": backend, "version": version, "device": "cuda", "gpu": str(gpu), "driver": gpu.driver}


def require_precision(backend: Backend, bundle: Bundle, tower: str, precision: str) -> None:
    """Check that the bundle has a precision and that the backend can run it.

    Raises:
        BundleError: the bundle does not have the precision.
        BackendMissing: the backend cannot run it; the message lists the precisions that it can run.
    """
    bundle.graph(tower, precision)
    if precision not in (possible := backend.precisions(bundle, tower)):
        raise BackendMissing(
            f"{backend.name} on {backend.device} runs {' and '.join(possible) or 'no precision'} of this bundle's "
            f"{tower} tower, not {precision}; engines need fp16 graphs, and int8 graphs run on CPUs only"
        )


def require_open(process: int, handle: T | None) -> T:
    """Check that a session is open and belongs to this process.

    Args:
        process: id of the process that opened the session.
        handle: the library's session; None after it was closed.

    Returns:
        The handle.

    Raises:
        BackendError: the session is closed or belongs to another process.
    """
    if os.getpid() != process:
        raise BackendError(
            f"this model was opened in process {process} and does not work after a fork in process {os.getpid()}; "
            "open a ClipModel in each process, or start processes with 'spawn'"
        )
    if handle is None:
        raise BackendError("this model is closed; open a new ClipModel")
    return handle


_live: weakref.WeakSet[Session] = weakref.WeakSet()


def keep_after_fork(session: Session) -> None:
    """Prevent this session from being freed in a forked child process.

    Freeing it would join threads and call devices that the child does not have. The session's `close` must do nothing
    in another process.
    """
    _live.add(session)


def _keep_all() -> None:
    for session in list(_live):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_all)
