"""Progress output on stderr. Nothing is written if stderr is not a terminal."""

from __future__ import annotations

import sys
import time


class Progress:
    """A progress line such as `texts 120/400  31/s`, updated in place.

    Args:
        what: noun at the start of the line.
        total: number of items.
        shown: False disables the output.
    """

    def __init__(self, what: str, total: int, *, shown: bool = True) -> None:
        self._what, self._total, self._done = what, total, 0
        self._shown = shown and sys.stderr.isatty() and total > 1
        self._start = self._last = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if self._shown and (now - self._last > 0.1 or self._done == self._total):
            self._last = now
            rate = self._done / max(now - self._start, 1e-9)
            end = "\n" if self._done >= self._total else ""
            print(f"\r{self._what} {self._done}/{self._total}  {rate:.3g}/s ", end=end, file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Print a line of progress on stderr, if it is a terminal."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
