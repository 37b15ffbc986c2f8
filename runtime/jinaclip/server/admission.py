"""Admission control: limits on what all requests of a server may use at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jinaclip.errors import Overloaded


class Room:
    """A counting limit on a resource, for example queued items or bytes of request bodies.

    It bounds the memory that requests use. Safe to use from several threads.

    Args:
        what: the name of the resource in the plural, for messages.
        limit: the largest amount in use at the same time.

    Attributes:
        held: the amount in use.
        refused: the total amount that was rejected because of the limit.
    """

    def __init__(self, what: str, limit: int) -> None:
        self.what, self.limit, self.held, self.refused = what, limit, 0, 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Reserve an amount. Release it with `give_back`.

        Raises:
            Overloaded: the limit would be exceeded.
        """
        with self._lock:
            if self.held + count > self.limit:
                self.refused += count
                raise Overloaded(
                    f"{self.held} {self.what} are queued or being processed, and {count} more would exceed the limit "
                    f"of {self.limit}; retry later, or send fewer at once"
                )
            self.held += count

    def give_back(self, count: int) -> None:
        """Release a reserved amount."""
        with self._lock:
            self.held -= count

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Reserve an amount for the duration of the block."""
        self.take(count)
        try:
            yield
        finally:
            self.give_back(count)
