"""A pool of resources that threads borrow. It can be closed while items are borrowed.

A signal handler can raise an exception at any point in the main thread, as Ctrl-C does. Items therefore move between
the pool and a loan in a single call of C code, during which no handler runs, so that an item is always in exactly one
of the two. threading.Condition is not used, because a handler that raises while the condition is being entered leaves
its lock locked.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from jinaclip.errors import BackendError

T = TypeVar("T")


class Pool(Generic[T]):
    """Safe to use from several threads at once.

    Args:
        items: the items to lend. The item that was returned last is lent first.
    """

    def __init__(self, items: Sequence[T]) -> None:
        self._idle = list(items)
        self._items = list(items)
        self._borrowers: dict[int, int] = {}  # item's id -> thread that borrowed it last
        self._closed = False
        self._lock = threading.RLock()  # reentrant, because the garbage collector can return a loan
        self._waiting: list[threading.Lock] = []  # locked; a waiting thread acquires its lock when it is released

    def borrow(self) -> Loan[T]:
        """Wait until an item is idle, and borrow it. The loan is empty if the pool is closed before or meanwhile."""
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

    def close(self) -> None:
        """Stop lending, and wait until all items are returned.

        Raises:
            BackendError: the calling thread has borrowed an item itself, for instance because this is called in a
                signal handler that interrupted a run. Waiting would never end, so the pool stays open.
        """
        while True:
            with self._lock:
                lent = [item for item in self._items if not any(item is other for other in self._idle)]
                if any(self._borrowers.get(id(item)) == threading.get_ident() for item in lent):
                    raise BackendError(
                        "a model cannot be closed from within a run of it in the same thread; close it after the run"
                    )
                self._closed = True
                self._wake()
                if not lent:
                    return
                changed = self._next_change()
            changed.acquire()

    def _next_change(self) -> threading.Lock:
        """A lock that can be acquired after the next change of the pool."""
        changed = threading.Lock()
        changed.acquire()
        self._waiting.append(changed)
        return changed

    def _wake(self) -> None:
        while self._waiting:
            with suppress(RuntimeError):  # already released, if a handler raised before the next line
                self._waiting[-1].release()
            self._waiting.pop()


class Loan(Generic[T]):
    """A borrowed item. It is returned when the `with` block ends or the loan is garbage-collected."""

    def __init__(self, pool: Pool[T]) -> None:
        self._pool = pool
        self.items: list[T] = []

    @property
    def item(self) -> T | None:
        return self.items[0] if self.items else None

    def take_over(self) -> Loan[T]:
        """Move the item to a new loan of the calling thread. That loan is empty if the item was already returned."""
        loan = Loan(self._pool)
        with self._pool._lock:
            if self.items:
                self._pool._borrowers[id(self.items[-1])] = threading.get_ident()
                _move(self.items, loan.items)
        return loan

    def give_back(self) -> None:
        """Return the item. Does nothing if the loan is empty."""
        with self._pool._lock:
            if self.items:
                self._pool._wake()  # before the item is returned: if a handler raises here, give_back is called again
                _move(self.items, self._pool._idle)

    def __enter__(self) -> Loan[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def __del__(self) -> None:
        with suppress(AttributeError):  # if a handler raised in __init__
            if self.items:
                self.give_back()


def _move(source: list[T], target: list[T]) -> None:
    """Move the last item of a list to the end of another. Raises IndexError if there is none."""
    target.extend(map(list.pop, (source,)))
