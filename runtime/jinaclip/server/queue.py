"""Dynamic batching: a queue of items from many callers, and the worker threads that run them in batches.

The oldest item is always in the next batch; items that add little cost to the run join it. While one batch runs, new
items collect for the next one. An item whose future was cancelled is dropped before it enters a batch.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from jinaclip.backends.cost import RunCost
from jinaclip.bundle.manifest import TowerManifest
from jinaclip.errors import BackendError
from jinaclip.packing import pack_texts

CANDIDATES = 256  # the oldest queued texts that are considered for a batch; more do not improve it and take longer
T = TypeVar("T")
Vector = np.ndarray  # an unnormalized embedding, float32 [D]


class QueueClosed(BackendError):
    """The server shut down before an item was run."""


@dataclass
class Counts:
    """Counters of a queue since it was opened.

    Attributes:
        run: items that were run.
        dropped: items that were dropped because their futures were cancelled.
        failed: items whose run failed.
        failing: runs that failed since the last successful one.
        batches: the number of runs for each batch size, in items.
    """

    run: int = 0
    dropped: int = 0
    failed: int = 0
    failing: int = 0
    batches: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Entry(Generic[T]):
    item: T
    future: Future[Vector]
    since: float


class Batcher(Generic[T]):
    """A queue and the worker threads that run its items in batches. Safe to call from several threads.

    Args:
        name: the name of the queue, for thread names and messages.
        run: a function that computes the unnormalized embeddings [N, D] of a batch. Its second argument is True if no
            other batch runs and no item waits.
        choose: a function that selects the next batch. It gets the queued items, oldest first, and returns indexes.
        workers: the number of batches that run at the same time.
        gather_s: how long an idle queue waits for more items before it runs the first, in seconds; 0 disables this.
        observe: a function that is called after every successful run with the waiting time of each item and the
            duration of the run, in seconds.
    """

    def __init__(
        self, name: str, run: Callable[[Sequence[T], bool], np.ndarray],
        choose: Callable[[Sequence[T]], Sequence[int]], *, workers: int = 1, gather_s: float = 0.0,
        observe: Callable[[Sequence[float], float], None] = lambda waited, seconds: None,
    ) -> None:  # fmt: skip
        self.name, self.counts = name, Counts()
        self._run, self._choose, self._gather_s, self._observe = run, choose, gather_s, observe
        self._queued: list[_Entry[T]] = []
        self._changed = threading.Condition()
        self._open, self._running = True, 0
        for number in range(workers):
            threading.Thread(target=self._work, name=f"jinaclip-{name}-{number}", daemon=True).start()

    def submit(self, items: Sequence[T]) -> list[Future[Vector]]:
        """Add items to the queue. The queue itself has no size limit; the caller limits it with a `Limiter`.

        Returns:
            One future per item. Cancelling a future removes its item if it is still queued.

        Raises:
            QueueClosed: the queue is closed.
        """
        entries = [_Entry(item, Future[Vector](), time.monotonic()) for item in items]
        with self._changed:
            if not self._open:
                raise QueueClosed(f"the {self.name} queue is closed because the server is shutting down")
            self._queued.extend(entries)
            self._changed.notify_all()  # the items may be enough for several workers
        return [entry.future for entry in entries]

    def waiting(self) -> int:
        """The number of queued items."""
        return len(self._queued)

    def running(self) -> bool:
        """Whether a batch runs."""
        return self._running > 0

    def oldest(self) -> float:
        """The age of the oldest queued item, in seconds; 0 for an empty queue."""
        with self._changed:
            return time.monotonic() - self._queued[0].since if self._queued else 0.0

    def close(self, grace_s: float = 0.0) -> int:
        """Accept no more items and finish those in the queue.

        Args:
            grace_s: the longest time to wait for them, in seconds.

        Returns:
            The number of items that were not started in time; their futures raise BackendError.
        """
        deadline = time.monotonic() + grace_s
        with self._changed:
            self._open = False
            self._changed.notify_all()
            while (self._queued or self._running) and (remaining := deadline - time.monotonic()) > 0:
                self._changed.wait(remaining)
            unfinished, self._queued = self._queued, []
        for entry in unfinished:
            if entry.future.set_running_or_notify_cancel():
                entry.future.set_exception(QueueClosed("the server shut down before this item was run"))
        return len(unfinished)

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._open and not self._queued:
                    self._changed.wait()
                    self._gather()  # another worker may empty the queue meanwhile
                if not self._queued:
                    return
                batch = self._take()
                alone = not self._running and not self._queued
                self._running += 1
            try:
                if batch:
                    self._answer(batch, alone)
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

    def _gather(self) -> None:
        """Wait for more items until the oldest has waited `gather_s` or the next batch is full."""
        while self._open and self._queued:
            remaining = self._queued[0].since + self._gather_s - time.monotonic()
            if remaining <= 0 or len(self._choose([entry.item for entry in self._queued])) < len(self._queued):
                return
            self._changed.wait(remaining)

    def _take(self) -> list[_Entry[T]]:
        """Remove the next batch and the cancelled items from the queue."""
        queued = [entry for entry in self._queued if not entry.future.cancelled()]
        chosen = set(self._choose([entry.item for entry in queued])) if queued else set()
        batch = [queued[index] for index in sorted(chosen) if queued[index].future.set_running_or_notify_cancel()]
        rest = [entry for index, entry in enumerate(queued) if index not in chosen]
        self.counts.dropped += len(self._queued) - len(batch) - len(rest)
        self._queued = rest
        return batch

    def _answer(self, batch: Sequence[_Entry[T]], alone: bool) -> None:
        """Run a batch and set the result of every future; if the run fails, every future gets the error."""
        start = time.monotonic()
        try:
            vectors = list(self._run([entry.item for entry in batch], alone))
            if len(vectors) != len(batch):
                raise BackendError(f"a batch of {len(batch)} {self.name}s returned {len(vectors)} vectors")
        except Exception as error:  # any error is passed on to the callers
            self.counts.failed += len(batch)
            self.counts.failing += 1
            for entry in batch:
                entry.future.set_exception(error)
            return
        self.counts.failing = 0
        self.counts.run += len(batch)
        self.counts.batches[len(batch)] += 1
        self._observe([start - entry.since for entry in batch], time.monotonic() - start)
        for entry, vector in zip(batch, vectors, strict=True):
            entry.future.set_result(vector)


def choose_texts(rows: Sequence[Sequence[int]], tower: TowerManifest, cost: RunCost) -> list[int]:
    """Select the next batch of texts: the batch of `pack_texts` that contains the oldest text.

    Args:
        rows: token ids of the queued texts, oldest first.
        cost: the cost model of a run on this backend.
    """
    batches = pack_texts([len(row) for row in rows[:CANDIDATES]], tower, cost=cost)
    return next(batch for batch in batches if 0 in batch)


def choose_images(pixels: Sequence[np.ndarray], cost: RunCost) -> list[int]:
    """Select the next batch of images: the oldest ones, up to the batch size of the backend."""
    return list(range(min(len(pixels), cost.images)))
