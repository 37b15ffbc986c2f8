"""A pool of resources that threads borrow one at a time, and that can be closed while they are borrowed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
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
        self._borrowers: list[int] = []  # thread ids, one for each item that is lent
        self._closed = False
        self._changed = threading.Condition()

    def borrow(self) -> T | None:
        """An item, as soon as one is idle; None once the pool is closed, also for threads that were waiting."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._idle)
            if self._closed:
                return None
            self._borrowers.append(threading.get_ident())
            return self._idle.pop()

    def give_back(self, item: T) -> None:
        """An item that this thread borrowed."""
        with self._changed:
            self._borrowers.remove(threading.get_ident())
            self._idle.append(item)
            self._changed.notify_all()

    def close(self) -> None:
        """Lend nothing more, and wait until all items are back.

        Raises:
            BackendError: this thread has borrowed an item itself, for instance because a signal handler interrupted its
                run. Waiting for it would never end; the pool stays open.
        """
        with self._changed:
            if threading.get_ident() in self._borrowers:
                raise BackendError("a model cannot be closed from within a run of it in the same thread")
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._borrowers)
