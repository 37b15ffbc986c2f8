"""One thread for each GPU, in which all of the process's sessions on it are opened, run and closed by ONNX Runtime.

ONNX Runtime keeps library handles and their memory for every thread that runs a session. With one thread they are there
once, and an allocation or a wait of one session never meets the capture of another.

There is no threading.Condition, and so no ThreadPoolExecutor, here: where a handler of a signal raises while one is
entered, as Ctrl-C does, its lock stays locked, and the thread would wait for it for ever.
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
    """What work returns or raises, once it is done."""

    def __init__(self) -> None:
        self._undone = threading.Lock()
        self._undone.acquire()
        self._value: T | None = None
        self._error: BaseException | None = None

    def result(self) -> T:
        """Waits for it."""
        with self._undone:
            pass
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # the error's traceback has this frame
        return self._value  # type: ignore[return-value]  # None where T is

    def work_out(self, work: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        """Done in the GPU's thread."""
        try:
            self._value = work(*arguments)
        except BaseException as error:
            # Without this frame, which refers to the answer: a circle would keep what the error's frames refer to.
            self._error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        finally:
            self._undone.release()


class GpuThread:
    """A thread that works through what it is given, in order.

    Args:
        index: the device's number, for the thread's name.
    """

    def __init__(self, index: int) -> None:
        self._queue: queue.SimpleQueue[tuple[Answer[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._queue = queue.SimpleQueue()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name=f"jinaclip-cuda-{index}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[..., T], *arguments: Any) -> Answer[T]:
        """Run `work` after everything that was submitted before.

        Raises:
            BackendError: Python is shutting down.
        """
        if self._ended:
            raise BackendError("nothing can be run on a GPU any more: Python is shutting down")
        answer: Answer[T] = Answer()
        self._queue.put((answer, work, arguments))
        return answer

    def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run `work` after everything that was submitted before, and wait for what it returns or raises."""
        return self.submit(work, *arguments).result()

    def end(self) -> None:
        """Finish what was submitted, and nothing more."""
        self._ended = True
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (given := self._queue.get()) is not None:
            answer, work, arguments = given
            answer.work_out(work, arguments)
            del given, answer, work, arguments  # or they would live until the next


_threads: dict[int, GpuThread] = {}
_lock = threading.Lock()


def gpu_thread(index: int) -> GpuThread:
    """The thread of a device; started when it is first asked for."""
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
    os.register_at_fork(after_in_child=_forget)  # the child has none of these threads
