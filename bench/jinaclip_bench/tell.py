"""What a person who waits should know: one line on stderr, whether it is a terminal or not."""

from __future__ import annotations

import sys


def tell(line: str) -> None:
    print(f"jinaclip: {line}", file=sys.stderr, flush=True)
