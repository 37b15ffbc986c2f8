"""One thread per GPU, in which all ONNX Runtime sessions of the process on that GPU are opened, run and closed.

ONNX Runtime keeps library handles and memory for every thread that runs a session. With a single thread they exist only
once, and allocations and waits of one session cannot interfere with a graph capture of another.

threading.Condition is not used, and therefore no ThreadPoolExecutor: if a signal handler raises while a condition is
being entered, as Ctrl-C does, its lock stays locked and the thread would wait forever.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from jinaclip.errors import BackendError

T = TypeVar("T")


class Answer(Generic[T]):
    """The future result of submitted work."""

    def __init__(self) -> None:
        self._undone = threading.Lock()
        self._undone.acquire()
        self._value: T | None = None
        self._error: BaseException | None = None

    def result(self) -> T:
        """Wait for the work; return its result or raise its exception."""
        with self._undone:
            pass
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # the error's traceback refers to this frame
        return self._value  # type: ignore[return-value]  # None only if T is

    def work_out(self, work: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        """Do the work. Called in the GPU's thread."""
        try:
            self._value = work(*arguments)
        except BaseException as error:
            # This frame is dropped from the traceback, because it refers to this object. The reference cycle would keep
            # everything alive that the traceback's frames refer to.
            self._error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        finally:
            self._undone.release()


class GpuThread:
    """A thread that does submitted work in order.

    Args:
        index: number of the device, for the thread's name.
    """

    def __init__(self, index: int) -> None:
        self._queue: queue.SimpleQueue[tuple[Answer[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._queue = queue.SimpleQueue()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name=f"jinaclip-cuda-{index}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[..., T], *arguments: Any) -> Answer[T]:
        """Run `work` after all earlier submissions, without waiting for it.

        Raises:
            BackendError: Python is shutting down.
        """
        if self._ended:
            raise BackendError("the GPU cannot be used any more, because Python is shutting down")
        answer: Answer[T] = Answer()
        self._queue.put((answer, work, arguments))
        return answer

    def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run `work` after all earlier submissions, and wait for its result or exception."""
        return self.submit(work, *arguments).result()

    def end(self) -> None:
        """Finish the submitted work, and end the thread."""
        self._ended = True
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (given := self._queue.get()) is not None:
            answer, work, arguments = given
            answer.work_out(work, arguments)
            del given, answer, work, arguments  # otherwise they would stay alive until the next work arrives


_threads: dict[int, GpuThread] = {}
_lock = threading.Lock()


def gpu_thread(index: int) -> GpuThread:
    """The thread of a device. The first call starts it."""
    with _lock:
        if index not in _threads:
            _threads[index] = GpuThread(index)
        return _threads[index]


def _end_all() -> None:
    for thread in list(_threads.values()):
        thread.end()


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _threads.clear()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # a forked child does not have these threads
