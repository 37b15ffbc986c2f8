"""One thread for each GPU, in which all of the process's sessions on it are opened, run and closed by ONNX Runtime.

ONNX Runtime keeps library handles and their memory for every thread that runs a session. With one thread they are there
once, and an allocation or a wait of one session never meets the capture of another.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from jinaclip.errors import BackendError

T = TypeVar("T")


class GpuThread:
    """A thread that works through what it is given, in order.

    Args:
        index: the device's number, for the thread's name.
    """

    def __init__(self, index: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"jinaclip-cuda-{index}")

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run `work` after everything that was submitted before.

        Raises:
            BackendError: Python is shutting down.
        """
        try:
            return self._pool.submit(work, *arguments)
        except RuntimeError as error:
            raise BackendError(f"nothing can be run on a GPU any more: {error}") from error

    def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run `work` after everything that was submitted before, and wait for what it returns or raises."""
        return self.submit(work, *arguments).result()


_threads: dict[int, GpuThread] = {}
_lock = threading.Lock()


def gpu_thread(index: int) -> GpuThread:
    """The thread of a device; started when it is first asked for."""
    with _lock:
        if index not in _threads:
            _threads[index] = GpuThread(index)
        return _threads[index]


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # the child has none of these threads
