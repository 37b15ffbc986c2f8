"""Progress output on stderr. Nothing is written if stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable


def progress(what: str, total: int, *, shown: bool = True) -> Callable[[int], object]:
    """Show a progress bar.

    Args:
        what: noun at the start of the line.
        total: number of items.
        shown: False shows nothing.

    Returns:
        A function to call with the number of items that were finished.
    """
    if not shown or total < 2 or not sys.stderr.isatty():
        return lambda count: None
    from tqdm import tqdm

    update: Callable[[int], object] = tqdm(desc=what, total=total).update
    return update


def say(line: str) -> None:
    """Print a line of progress on stderr, if it is a terminal."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
