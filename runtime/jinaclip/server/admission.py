"""How much of a resource the requests of a server may hold at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jinaclip.errors import Overloaded


class Room:
    """How much of something may be taken at the same time: a bound on memory. Safe to use from several threads.

    Args:
        what: it is, in the plural.
        limit: of all that is taken.

    Attributes:
        refused: how much found no room.
    """

    def __init__(self, what: str, limit: int) -> None:
        self.what, self.limit, self.held, self.refused = what, limit, 0, 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Take so much; `give_back` it.

        Raises:
            Overloaded: there is not so much left.
        """
        with self._lock:
            if self.held + count > self.limit:
                self.refused += count
                raise Overloaded(
                    f"{self.held} {self.what} are in work or wait, and {count} more would pass the limit of "
                    f"{self.limit}; try again later, or send fewer at once"
                )
            self.held += count

    def give_back(self, count: int) -> None:
        with self._lock:
            self.held -= count

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """`take`, and give back at the end of the block."""
        self.take(count)
        try:
            yield
        finally:
            self.give_back(count)
