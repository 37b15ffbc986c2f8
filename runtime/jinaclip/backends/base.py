"""What runs a graph, behind one protocol: `Session`.

A session runs on one device with one backend: what was asked for is given or refused, never replaced.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jinaclip.backends.cost import RunCost
from jinaclip.errors import BackendError

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
