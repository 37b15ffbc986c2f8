"""What a part of the proof is given: where things lie, what it runs on, and where its results go."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Context:
    """One part's run.

    Attributes:
        part: its name.
        work: folder for what is large: the unpacked kit, checkpoint, bundle, compiler caches.
        output: folder for what is kept.
        device: torch's, "cuda" or "cpu".
        dry_run: small sizes, and nothing is held to its value.
        end: when the part is stopped, by time.monotonic().
    """

    part: str
    work: Path
    output: Path
    device: str
    dry_run: bool
    end: float

    @property
    def size(self) -> str:
        """Of the model that is measured."""
        return "small" if self.dry_run else "full"

    @property
    def weights_device(self) -> str:
        """Where weights are drawn and reference vectors computed: a stand-in for CUDA computes none."""
        return "cpu" if self.dry_run else self.device

    @property
    def model(self) -> Path:
        """checkpoint/ and bundle/ of it."""
        return self.work / self.size

    @property
    def bundle(self) -> Path:
        return self.model / "bundle"

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.end - time.monotonic()

    def record(self, name: str, **facts: Any) -> None:
        """Add a line to results.jsonl; of two with the same part and name the later one counts."""
        write_result(self.output, {"part": self.part, "name": name, **facts})

    def file(self, name: str) -> Path:
        """Path of a file that goes into the archive."""
        folder = self.output / "files"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name


def write_result(output: Path, line: dict[str, Any]) -> None:
    """Append a line to results.jsonl and print it, at once."""
    text = json.dumps(line, default=str)
    with (output / RESULTS).open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(text, flush=True)


def read_results(output: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl; a line that a killed part left unfinished is skipped."""
    found = []
    if (output / RESULTS).is_file():
        for line in (output / RESULTS).read_text("utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found
