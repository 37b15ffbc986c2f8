"""A pool of resources that threads borrow one at a time, and that can be closed while they are borrowed.

A handler of a signal may raise anywhere in the main thread, as Ctrl-C does. So an item moves between the pool and a
loan in one call of C code, in which no handler runs: it is always in one of them, and never in two. For the same reason
there is no threading.Condition here: a handler that raises while it is entered leaves its lock locked.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Generic, TypeVar

from jinaclip.errors import BackendError

T = TypeVar("T")


class Pool(Generic[T]):
    """Safe to use from several threads at once.

    Args:
        items: what is lent. The item that came back last is lent first.
    """

    def __init__(self, items: Sequence[T]) -> None:
        self._idle = list(items)
        self._items = list(items)
        self._borrowers: dict[int, int] = {}  # thread that has an item, or had it last, by the item's id
        self._closed = False
        self._lock = threading.RLock()  # a loan may be given back by the garbage collector
        self._waiting: list[threading.Lock] = []  # locked, each by the thread that waits for its release

    def borrow(self) -> Loan[T]:
        """A loan of an item, as soon as one is idle; an empty one once the pool is closed, also for threads that were
        waiting.
        """
        loan = Loan(self)
        while True:
            with self._lock:
                if self._idle and not self._closed:
                    _move(self._idle, loan.items)
                    self._borrowers[id(loan.items[0])] = threading.get_ident()
                if self._closed or loan.items:
                    return loan
                changed = self._next_change()
            changed.acquire()

    def take_over(self, items: list[T], target: list[T]) -> None:
        """Move what a loan has, if it has something, to a loan of the calling thread."""
        with self._lock:
            if items:
                self._borrowers[id(items[-1])] = threading.get_ident()
                _move(items, target)

    def give_back(self, items: list[T]) -> None:
        """What a loan has, if it has something."""
        with self._lock:
            if items:
                self._wake()  # before the item is back: where a handler raises here, it is given back again
                _move(items, self._idle)

    def close(self) -> None:
        """Lend nothing more, and wait until all items are back.

        Raises:
            BackendError: this thread has borrowed an item itself, for instance because a signal handler interrupted its
                run. Waiting for it would never end; the pool stays open.
        """
        while True:
            with self._lock:
                lent = [item for item in self._items if not any(item is other for other in self._idle)]
                if any(self._borrowers.get(id(item)) == threading.get_ident() for item in lent):
                    raise BackendError("a model cannot be closed from within a run of it in the same thread")
                self._closed = True
                self._wake()
                if not lent:
                    return
                changed = self._next_change()
            changed.acquire()

    def _next_change(self) -> threading.Lock:
        """Can be acquired after the next change."""
        changed = threading.Lock()
        changed.acquire()
        self._waiting.append(changed)
        return changed

    def _wake(self) -> None:
        while self._waiting:
            with suppress(RuntimeError):  # it was released, and a handler raised before the next line
                self._waiting[-1].release()
            self._waiting.pop()


class Loan(Generic[T]):
    """An item that is borrowed, until the `with` block ends or nothing refers to the loan any more."""

    def __init__(self, pool: Pool[T]) -> None:
        self._pool = pool
        self.items: list[T] = []

    @property
    def item(self) -> T | None:
        return self.items[0] if self.items else None

    def take_over(self) -> Loan[T]:
        """Move the item to a loan of the calling thread. It is empty where the item was given back meanwhile."""
        loan = Loan(self._pool)
        self._pool.take_over(self.items, loan.items)
        return loan

    def give_back(self) -> None:
        """Does nothing for an empty loan."""
        self._pool.give_back(self.items)

    def __enter__(self) -> Loan[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_back()

    def __del__(self) -> None:
        with suppress(AttributeError):  # a handler raised in __init__
            if self.items:
                self.give_back()


def _move(source: list[T], target: list[T]) -> None:
    """The last item of a list to the end of another. Raises IndexError: there is none."""
    target.extend(map(list.pop, (source,)))
