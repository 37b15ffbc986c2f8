"""The kinds of cases that run in new processes (jinaclip_bench.sides.single_call), to measure memory."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from jinaclip_bench.cases.inputs import texts_of
from jinaclip_bench.cases.settings import BenchSettings, Embed, OpenCase
from jinaclip_bench.cases.table import PHOTO_SIZE, QUERY, Case, photo_jpeg
from jinaclip_bench.measuring.subprocesses import run_json
from jinaclip_bench.measuring.timing import JINACLIP, Sample, is_jinaclip, jinaclip_side, precision_of


def process(case: Case, settings: BenchSettings, torch: Mapping[str, Embed]) -> AbstractContextManager[OpenCase]:
    """Time from the start of a new process to its first vector, with its files in the page cache."""
    if case.tower == "image":
        return _open(case, settings, "first", photo_jpeg(), None)
    tokens = len(settings.bundle.open_tokenizer().encode([QUERY])[0])
    return _open(case, settings, "first", QUERY.encode(), tokens)


def long_text(case: Case, settings: BenchSettings, torch: Mapping[str, Embed]) -> AbstractContextManager[OpenCase]:
    """Time and memory of one call in a new process, without the loading of the model. Torch is not measured."""
    assert case.tokens is not None  # the table of cases gives it its length
    (text,) = texts_of(settings.bundle, settings.bundle.open_tokenizer(), [case.tokens])
    return _open(case, settings, "call", text.encode(), case.tokens)


@contextmanager
def _open(case: Case, settings: BenchSettings, timed: str, content: bytes, tokens: int | None) -> Iterator[OpenCase]:
    """Open a case.

    Args:
        case: the case.
        settings: settings of the run.
        timed: "first" to time the whole process, "call" to exclude the loading of the model.
        content: content of the input file.
        tokens: number of tokens of a text; None for an image.
    """
    names = [*map(jinaclip_side, settings.precisions)]
    if timed == "first" and settings.checkpoint is not None:
        names.append("torch-fp32")
    with tempfile.TemporaryDirectory(prefix="jinaclip-bench-") as directory:
        path = Path(directory) / "input"
        path.write_bytes(content)
        sides = {name: partial(_run_process, name, timed, case.tower, path, settings) for name in names}
        shape = (*PHOTO_SIZE[::-1], 3) if tokens is None else (1, tokens)
        yield OpenCase(sides, shape, tokens, burn_in=1, steady=timed == "call")


def _run_process(side: str, timed: str, tower: str, path: Path, settings: BenchSettings) -> Sample:
    options = {
        "side": JINACLIP if is_jinaclip(side) else side,
        "time": timed,
        "tower": tower,
        "bundle": settings.bundle.directory,
        "precision": precision_of(side),
        "threads": settings.threads,
        "input": path,
    }
    if settings.checkpoint is not None:
        options["checkpoint"] = settings.checkpoint.directory
    words = [f"--{name}={value}" for name, value in options.items()]
    start = time.monotonic()  # this clock is the same in all processes
    command = [sys.executable, "-P", "-m", "jinaclip_bench.sides.single_call", *words]
    found = run_json(command, f"the {side} {tower} process")
    return Sample(
        seconds=found["done_s"] - (start if timed == "first" else found["begun_s"]),
        output=np.array(found["vector"], np.float32),
        peak_rss_mib=found["peak_rss_mib"],
        pss_mib=found["pss_mib"],
        above_load_mib=found["above_load_mib"] if timed == "call" else None,
    )
