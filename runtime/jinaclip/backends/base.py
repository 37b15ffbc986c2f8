"""What runs a graph, behind one protocol: `Session`.

A session runs on one device with one backend: what was asked for is given or refused, never replaced.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from jinaclip.backends.cost import RunCost
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError, BackendMissing

Arrays = Mapping[str, np.ndarray]


class Session(Protocol):
    """A graph that is ready to run. Safe to call from several threads at once."""

    backend: str
    device: str
    threads: int
    concurrency: int  # runs that gain from being asked for at the same time
    cost: RunCost
    tiled_above: int | None  # texts without padding of more tokens need no memory for all scores; None: all do

    def run(
        self, inputs: Arrays, *, outputs: Sequence[str] | None = None, interruptible: bool = False,
        release_memory: bool = False,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Outputs by name.

        Args:
            outputs: names of those that are wanted; None: all.
            interruptible: let Ctrl-C end a long run in the main thread.
            release_memory: give the run's memory back to the system, instead of keeping it for the next.
        """

    def describe(self) -> dict[str, Any]:
        """What runs this graph, for info() and certificates; JSON values only."""

    def close(self) -> None:
        """Free the graph; running it afterwards is an error."""


class Backend(Protocol):
    """What runs the graphs of a bundle: a library on a device. A new one is a class in a file of its own, and a line in
    selection.py.
    """

    @property
    def name(self) -> str:
        """As `ClipModel(backend=…)` takes it."""

    @property
    def device(self) -> str:
        """ "cpu" or "cuda", for certificates: whichever GPU of its kind."""

    @property
    def gpu(self) -> Gpu | None:
        """The GPU; None for the CPU."""

    @property
    def reason(self) -> str:
        """Why it was chosen, in words."""

    def facts(self) -> dict[str, Any]:
        """What decides a graph's numbers here, known before one is opened: part of every session's `describe()`."""

    def precisions(self, bundle: Bundle, tower: str) -> tuple[str, ...]:
        """Precisions of the bundle's graphs of a tower that it can run."""

    def open(self, bundle: Bundle, tower: str, precision: str, *, threads: int | None = None) -> tuple[Session, str]:
        """A session of a tower, and which graph or engine it is, in words.

        Args:
            threads: cores for one run on the CPU; None takes what this process may use.

        Raises:
            BundleError: the bundle lacks the precision.
            BackendMissing, EngineMismatch: there is no engine that fits; says how to build one.
        """

    def graph(self, bundle: Bundle, tower: str, precision: str) -> str:
        """Identity of what would be opened: the bundle's graph, and what was made of it."""


class GpuBackend(Backend, Protocol):
    """A backend for GPUs, as selection.py asks for it."""

    @classmethod
    def on(cls, name: str, gpu: Gpu) -> Self:
        """The backend that was asked for by name.

        Raises:
            BackendMissing: it cannot be used here; says what is missing.
        """

    @classmethod
    def fitting(
        cls, name: str, gpu: Gpu, bundle: Bundle, towers: Sequence[str], precision: Mapping[str, str]
    ) -> Self | str | None:
        """For "auto": the backend, if it can run these towers; else why not, in words, or None where the bundle has
        nothing for it.

        Args:
            precision: by tower, what was asked for; "auto" or a missing one leaves it open.
        """


def require_precision(backend: Backend, bundle: Bundle, tower: str, precision: str) -> None:
    """Refuse a precision that the bundle lacks or the backend does not run.

    Raises:
        BundleError, BackendMissing: lists what there is.
    """
    bundle.graph(tower, precision)
    if precision not in (possible := backend.precisions(bundle, tower)):
        raise BackendMissing(
            f"{backend.name} on {backend.device} runs {' and '.join(possible) or 'nothing'} of this bundle's {tower} "
            f"tower, not {precision}: engines are made of fp16 graphs, int8 graphs for CPUs"
        )


def require_open(process: int, handle: object) -> None:
    """Refuse a session that was opened in another process, or is closed.

    Args:
        process: id of the process that opened it.
        handle: what it runs; None once it is closed.
    """
    if os.getpid() != process:
        raise BackendError(
            f"this model was opened in process {process} and does not work after a fork in process {os.getpid()}; "
            "open a ClipModel in each process, or start processes with 'spawn'"
        )
    if handle is None:
        raise BackendError("this model is closed; open a new ClipModel")


_live: weakref.WeakSet[Session] = weakref.WeakSet()


def keep_after_fork(session: Session) -> None:
    """Never free this session in a forked child: its library joins threads and calls devices that are not there. Its
    `close` must do nothing in another process.
    """
    _live.add(session)


def _keep_all() -> None:
    for session in list(_live):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_all)
