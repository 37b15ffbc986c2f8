"""Messages about slow steps: one line on stderr, also if stderr is not a terminal."""

from __future__ import annotations

import sys


def tell(line: str) -> None:
    print(f"jinaclip: {line}", file=sys.stderr, flush=True)
