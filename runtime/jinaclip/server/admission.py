"""Admission control: limits on what all requests of a server may use at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jinaclip.errors import Overloaded


class Limiter:
    """A limit on a resource that requests use together, for example queued items or bytes of request bodies.

    Unlike a semaphore it never waits: what would exceed the limit is rejected. Safe to use from several threads.

    Args:
        resource: the name of the resource in the plural, for messages.
        limit: the largest amount in use at the same time.

    Attributes:
        in_use: the amount in use.
        refused: the total amount that was rejected because of the limit.
    """

    def __init__(self, resource: str, limit: int) -> None:
        self.resource, self.limit, self.in_use, self.refused = resource, limit, 0, 0
        self._lock = threading.Lock()

    def acquire(self, amount: int) -> None:
        """Reserve an amount. Release it with `release`.

        Raises:
            Overloaded: the limit would be exceeded.
        """
        with self._lock:
            if self.in_use + amount > self.limit:
                self.refused += amount
                raise Overloaded(
                    f"{self.in_use} {self.resource} are queued or being processed, and {amount} more would exceed the "
                    f"limit of {self.limit}; retry later, or send fewer at once"
                )
            self.in_use += amount

    def release(self, amount: int) -> None:
        """Release a reserved amount."""
        with self._lock:
            self.in_use -= amount

    @contextmanager
    def reserved(self, amount: int) -> Iterator[None]:
        """Reserve an amount for the duration of the block.

        Raises:
            Overloaded: the limit would be exceeded.
        """
        self.acquire(amount)
        try:
            yield
        finally:
            self.release(amount)
