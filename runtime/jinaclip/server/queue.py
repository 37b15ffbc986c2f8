"""Items of many callers, run together: the queue of a server, and how much of it may be taken.

Whoever waits longest is served first, and takes with him those whose run costs little beside his. While a batch runs
the next one gathers; an item whose caller has left is dropped before it enters one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from jinaclip.backends.cost import RunCost
from jinaclip.bundle.manifest import TowerManifest
from jinaclip.errors import BackendError, Overloaded
from jinaclip.packing import pack_texts

LOOKED_AT = 256  # texts that are packed for a run: more are not better served, and take longer to look at
T = TypeVar("T")
Vector = np.ndarray  # raw, [D] float32


@dataclass
class Counts:
    """What a queue has done since it was opened.

    Attributes:
        run: items that were run.
        left: items that were dropped, for their callers had left.
        failed: items whose run failed.
        failing: runs that failed since the last one that did not.
        batches: runs, by their number of items.
    """

    run: int = 0
    left: int = 0
    failed: int = 0
    failing: int = 0
    batches: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Waiting(Generic[T]):
    item: T
    future: Future[Vector]
    since: float


class Batcher(Generic[T]):
    """A queue, and the threads that run what is in it. Safe to call from several threads.

    Args:
        name: of the queue, for its threads.
        run: raw vectors [N, D] of items that run together; told whether they are alone: nothing else runs or waits.
        choose: which of the waiting items run now, the longest waiting first; gets them in the order they came.
        workers: batches that run at the same time.
        gather_s: how long an item waits for company where nothing runs; 0 starts it at once.
        observe: told of every run that succeeded: how long each item waited and how long it ran, in seconds.
    """

    def __init__(
        self, name: str, run: Callable[[Sequence[T], bool], np.ndarray],
        choose: Callable[[Sequence[T]], Sequence[int]], *, workers: int = 1, gather_s: float = 0.0,
        observe: Callable[[Sequence[float], float], None] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.counts = name, Counts()
        self._run, self._choose, self._gather_s, self._observe = run, choose, gather_s, observe
        self._waiting: deque[_Waiting[T]] = deque()
        self._changed = threading.Condition()
        self._open, self._running = True, 0
        self._threads = [
            threading.Thread(target=self._work, name=f"jinaclip-{name}-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, items: Sequence[T]) -> list[Future[Vector]]:
        """Put items into the queue; how many there may be is for a `Room` to say.

        Returns:
            A future for each; cancel it, and an item that still waits is dropped.

        Raises:
            Overloaded: the queue is closed.
        """
        now = time.monotonic()
        entries = [_Waiting(item, Future[Vector](), now) for item in items]
        with self._changed:
            if not self._open:
                raise Overloaded(f"the {self.name} queue is closed: this process is about to end")
            self._waiting.extend(entries)
            self._changed.notify_all()  # several workers may find something in them
        return [entry.future for entry in entries]

    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._waiting)

    def oldest(self) -> float:
        """How long the first has waited, in seconds; 0 for an empty queue."""
        with self._changed:
            return time.monotonic() - self._waiting[0].since if self._waiting else 0.0

    def close(self, grace_s: float = 0.0) -> int:
        """Take nothing more, and finish what is there.

        Args:
            grace_s: how long to wait for it.

        Returns:
            Items that were not finished in time; their futures hold an error.
        """
        deadline = time.monotonic() + grace_s
        with self._changed:
            self._open = False
            self._changed.notify_all()
            while (self._waiting or self._running) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            unfinished = list(self._waiting)
            self._waiting.clear()
        for entry in unfinished:
            if entry.future.set_running_or_notify_cancel():
                entry.future.set_exception(BackendError("the process ended before this was run"))
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return len(unfinished)

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._open and not self._waiting:
                    self._changed.wait()
                    self._gather()  # meanwhile another worker may take all
                if not self._waiting:
                    self._changed.notify_all()
                    return
                batch = self._take()
                alone = not self._running and not self._waiting
                self._running += 1
            try:
                if batch:
                    self._answer(batch, alone)
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

    def _gather(self) -> None:
        """Wait for company, as long as the first may and there is room beside it."""
        while self._open and self._waiting:
            left = self._waiting[0].since + self._gather_s - time.monotonic()
            if left <= 0 or len(self._choose([entry.item for entry in self._waiting])) < len(self._waiting):
                return
            self._changed.wait(left)

    def _take(self) -> list[_Waiting[T]]:
        """What runs now, out of the queue."""
        self._forget_those_who_left()
        waiting = list(self._waiting)
        if not waiting:
            return []
        chosen = set(self._choose([entry.item for entry in waiting]))
        batch = [entry for index, entry in enumerate(waiting) if index in chosen]
        self._waiting = deque(entry for index, entry in enumerate(waiting) if index not in chosen)
        taken = [entry for entry in batch if entry.future.set_running_or_notify_cancel()]
        self.counts.left += len(batch) - len(taken)
        return taken

    def _forget_those_who_left(self) -> None:
        here = deque(entry for entry in self._waiting if not entry.future.cancelled())
        self.counts.left += len(self._waiting) - len(here)
        self._waiting = here

    def _answer(self, batch: Sequence[_Waiting[T]], alone: bool) -> None:
        """Run a batch, and hand every caller his own vector; where it fails, the error to each."""
        start = time.monotonic()
        try:
            vectors = list(self._run([entry.item for entry in batch], alone))
            if len(vectors) != len(batch):
                raise BackendError(f"{len(batch)} {self.name}s gave {len(vectors)} vectors")
        except Exception as error:  # whatever it is, it belongs to those who wait for it
            self.counts.failed += len(batch)
            self.counts.failing += 1
            for entry in batch:
                entry.future.set_exception(error)
            return
        self.counts.failing = 0
        self.counts.run += len(batch)
        self.counts.batches[len(batch)] = self.counts.batches.get(len(batch), 0) + 1
        if self._observe is not None:
            self._observe([start - entry.since for entry in batch], time.monotonic() - start)
        for entry, vector in zip(batch, vectors, strict=True):
            entry.future.set_result(vector)


def choose_texts(rows: Sequence[Sequence[int]], tower: TowerManifest, cost: RunCost) -> list[int]:
    """Which texts run with the one that waited longest, where those that wait are packed as `pack_texts` does.

    Args:
        rows: ids, in the order they came.
        cost: of a run where they run.
    """
    batches = pack_texts([len(row) for row in rows[:LOOKED_AT]], tower, cost=cost)
    return next(batch for batch in batches if 0 in batch)


def choose_images(pixels: Sequence[np.ndarray], cost: RunCost) -> list[int]:
    """The pictures that waited longest, as many as run together."""
    return list(range(min(len(pixels), cost.images)))
