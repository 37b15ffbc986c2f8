"""The kinds of cases that run in new processes (jinaclip_bench.sides.single_call), to measure memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from jinaclip_bench.cases.inputs import texts_of
from jinaclip_bench.cases.settings import Embed, Opened, Settings
from jinaclip_bench.cases.table import PHOTO_SIZE, QUERY, Case, photo_jpeg
from jinaclip_bench.errors import BenchError
from jinaclip_bench.measuring.timing import Sample, is_ours, ours, precision_of

MOST_ROUNDS = 3  # a round is slow


@contextmanager
def process(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """Time from the start of a new process to its first vector, with its files in the page cache."""
    shape: tuple[int, ...]
    if case.tower == "text":
        tokens: int | None = len(settings.bundle.open_tokenizer().encode([QUERY])[0])
        content, shape = QUERY.encode(), (1, tokens or 0)
    else:
        settings.bundle.tower("image")
        content, shape, tokens = photo_jpeg(), (PHOTO_SIZE[1], PHOTO_SIZE[0], 3), None
    others = [] if settings.checkpoint is None else ["torch-fp32"]
    with _input(content) as path:
        yield _opened("first", others, path, shape, tokens, case, settings)


@contextmanager
def long_text(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """Time and memory of one call in a new process, without the loading of the model. Torch is not measured."""
    assert case.tokens is not None  # the table of cases gives it its length
    (text,) = texts_of(settings.bundle, settings.bundle.open_tokenizer(), [case.tokens])
    with _input(text.encode()) as path:
        yield _opened("call", [], path, (1, case.tokens), case.tokens, case, settings)


@contextmanager
def _input(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jinaclip-bench-") as scratch:
        path = Path(scratch) / "input"
        path.write_bytes(content)
        yield path


def _opened(
    timing: str, others: list[str], path: Path, shape: tuple[int, ...], tokens: int | None, case: Case,
    settings: Settings,
) -> Opened:  # fmt: skip
    names = [*map(ours, settings.precisions), *others]
    return Opened(
        sides={name: partial(_start, name, timing, case.tower, path, settings) for name in names},
        shape=shape,
        tokens=tokens,
        threads=settings.threads,
        rounds=min(settings.repeats, MOST_ROUNDS),
        burn_in=1,
        steady=timing == "call",
    )


def _start(side: str, timing: str, tower: str, path: Path, settings: Settings) -> Sample:
    options = {
        "side": "jinaclip" if is_ours(side) else side,
        "time": timing,
        "tower": tower,
        "bundle": settings.bundle.directory,
        "precision": precision_of(side),
        "threads": settings.threads,
        "input": path,
    }
    if settings.checkpoint is not None:
        options["checkpoint"] = settings.checkpoint.directory
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-P", "-m", "jinaclip_bench.sides.single_call", *words]
    start = time.monotonic()  # this clock is the same in all processes
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        killed = "; was there enough memory?" if done.returncode < 0 else ""
        raise BenchError(f"the {side} {tower} process failed with status {done.returncode}: {said}{killed}")
    found = json.loads(done.stdout)
    begun = start if timing == "first" else found["begun_s"]
    return Sample(
        seconds=found["done_s"] - begun,
        output=np.array(found["vector"], np.float32),
        peak_rss_mib=found["peak_rss_mib"],
        pss_mib=found["pss_mib"],
        above_load_mib=found["above_load_mib"] if timing == "call" else None,
    )
