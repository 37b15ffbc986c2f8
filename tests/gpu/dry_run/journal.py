"""What a program did with CUDA, read from the journal of the stand-in (tests/gpu/stand_in/journal.h)."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
LAUNCHES = ("kernel", "product")
# Flash attention, CUTLASS's memory-efficient attention, and the launches of jinaclip's.
_ATTENTION = re.compile(r"flash_fwd(_splitkv)?_kernel|attention_kernel_batched|jinaclip.*(attention|keys)_kernel")


@dataclass(frozen=True)
class Record:
    """A part of the journal.

    Attributes:
        entries: its lines, in the order in which they were written.
    """

    entries: list[Entry]

    def of(self, event: str, **fields: Any) -> list[Entry]:
        """Entries of an event whose fields have these values."""
        return [e for e in self.entries if e["event"] == event and fields.items() <= e.items()]

    @property
    def faults(self) -> list[str]:
        """What CUDA forbids, and captures that were lost; empty for a correct program."""
        lost = [e for e in self.entries if e["event"] == "capture invalid"]
        return [f"{e['function']}: {e.get('why', 'a capture is lost')}" for e in self.of("fault") + lost]

    @property
    def threads(self) -> set[int]:
        """Threads that called CUDA."""
        return {e["thread"] for e in self.entries}

    @property
    def launches(self) -> list[Entry]:
        """Kernels and products in order: those that ran by themselves, not those that were captured."""
        return [e for e in self.entries if e["event"] in LAUNCHES and not e["capture"]]

    def captured(self) -> dict[int, list[Entry]]:
        """Kernels and products of each capture that ended well."""
        return {
            end["capture"]: [e for e in self.entries if e["event"] in LAUNCHES and e["capture"] == end["capture"]]
            for end in self.of("capture end", invalid=0)
        }

    def growth(self, what: str) -> int:
        """Streams, events or graphs that were made and not destroyed."""
        return len(self.of("create", what=what)) - len(self.of("destroy", what=what))


class Journal:
    """The journal of this process and its children.

    Args:
        path: the file that STAND_IN_JOURNAL names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def mark(self) -> int:
        """The place where the journal ends now."""
        return self.path.stat().st_size if self.path.exists() else 0

    def since(self, mark: int) -> Record:
        """What was written behind a mark."""
        if not self.path.exists():
            return Record([])
        with self.path.open("rb") as file:
            file.seek(mark)
            return Record([json.loads(line) for line in file])


def launches_per_block(launches: list[Entry]) -> int:
    """Launches from the end of the first block's attention to that of the second's; the last may be for one token."""
    found = [bool(_ATTENTION.search(launch.get("kernel", ""))) for launch in launches]
    ends = [index for index, pair in enumerate(itertools.pairwise(found)) if pair == (True, False)]
    return ends[1] - ends[0]
