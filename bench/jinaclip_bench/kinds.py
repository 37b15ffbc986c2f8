"""How each kind of case becomes sides to call: `kind(case, settings, torch)` opens it and frees it again.

Every side of a case starts from the same ids, pixels, text or file and ends with the same unit vectors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jinaclip.bundle import Bundle
from jinaclip.image import normalise, preprocess
from jinaclip.model import ClipModel
from jinaclip.selftest import run_self_test
from jinaclip.sessions import OnnxRuntimeSession
from jinaclip.text import TextTokenizer
from jinaclip_bench.cases import PHOTO_SIZE, QUERY, Case, photo_jpeg, random_ids
from jinaclip_bench.errors import BenchError
from jinaclip_bench.measure import OURS, Sample, Side, timed

if TYPE_CHECKING:
    from jinaclip_export.checkpoint import Checkpoint


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run. Without a checkpoint there is nothing to compare with."""

    bundle: Bundle
    checkpoint: Checkpoint | None
    threads: int
    repeats: int
    precision: str = "fp32"


@dataclass(frozen=True)
class Opened:
    """A case that is ready.

    Attributes:
        sides: by name, ours first.
        shape: of what goes in.
        tokens: in a call, padding excluded; None for images.
        threads: that a call uses.
        rounds, burn_in: timed calls of each side, and calls before them.
        steady: whether items per second mean anything: not where every call is a new process.
    """

    sides: Mapping[str, Side]
    shape: tuple[int, ...]
    tokens: int | None
    threads: int
    rounds: int
    burn_in: int = 3
    steady: bool = True


Embed = Callable[[np.ndarray], np.ndarray]
Kind = Callable[[Case, Settings, Mapping[str, Embed]], AbstractContextManager[Opened]]


@contextmanager
def graph(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """Ids or pixels to unit vectors: the tower alone."""
    bundle, tower = settings.bundle, settings.bundle.tower(case.tower)
    if case.tower == "text":
        assert case.tokens is not None  # the table of cases gives every text graph its length
        inputs = random_ids(bundle, case.rows, case.tokens)  # [B, T]
    else:
        inputs = np.stack([preprocess(photo_jpeg(), bundle.preprocessing)] * case.rows)  # [B, S, S, 3]
    session = OnnxRuntimeSession(bundle.graph(case.tower, settings.precision), threads=settings.threads)
    with closing(session):
        tokenizer = _tokenizer(bundle) if case.tower == "text" else None
        run_self_test(bundle, case.tower, settings.precision, session, tokenizer=tokenizer)

        def ours(values: np.ndarray) -> np.ndarray:
            if tower.input_dtype == "float32":
                values = normalise(values, bundle.preprocessing)
            return session.run({tower.input_name: values})[f"l2norm_{case.tower}_embeddings"]

        calls = {OURS: ours, **torch}
        yield Opened(
            sides={name: timed(partial(call, inputs)) for name, call in calls.items()},
            shape=inputs.shape,
            tokens=inputs.size if case.tower == "text" else None,
            threads=settings.threads,
            rounds=settings.repeats,
        )


@contextmanager
def encode(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """A text to its vector, tokenizer included; torch gets the same tokenizer."""
    tokenizer = _tokenizer(settings.bundle)

    def theirs(embed: Embed) -> np.ndarray:
        return embed(tokenizer.padded(tokenizer.encode([QUERY])))

    tokens = len(tokenizer.encode([QUERY])[0])
    precision = {case.tower: settings.precision}
    with ClipModel(
        settings.bundle.directory, towers=(case.tower,), precision=precision, threads=settings.threads
    ) as model:
        calls = {OURS: partial(model.encode_text, [QUERY])}
        calls |= {name: partial(theirs, embed) for name, embed in torch.items()}
        yield Opened(
            sides={name: timed(call) for name, call in calls.items()},
            shape=(1, tokens),
            tokens=tokens,
            threads=settings.threads,
            rounds=settings.repeats,
        )


@contextmanager
def preprocessing(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """A JPEG to pixels, in one thread. Torch has no part in it, so it stands alone."""
    settings.bundle.tower(case.tower)
    call = partial(preprocess, photo_jpeg(), settings.bundle.preprocessing)
    width, height = PHOTO_SIZE
    yield Opened({OURS: timed(call)}, shape=(height, width, 3), tokens=None, threads=1, rounds=settings.repeats)


@contextmanager
def process(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """A new process to its first vector, its files in the page cache; at most three times, it takes long."""
    bundle = settings.bundle
    bundle.graph(case.tower, settings.precision)
    with tempfile.TemporaryDirectory(prefix="jinaclip-bench-") as scratch:
        source: str
        shape: tuple[int, ...]
        tokens: int | None
        if case.tower == "text":
            tokens = len(_tokenizer(bundle).encode([QUERY])[0])
            source, shape = QUERY, (1, tokens)
        else:
            (photo := Path(scratch) / "photo.jpg").write_bytes(photo_jpeg())
            source, shape, tokens = str(photo), (PHOTO_SIZE[1], PHOTO_SIZE[0], 3), None
        names = (OURS,) if settings.checkpoint is None else (OURS, "torch-fp32")
        yield Opened(
            sides={name: partial(_start, name, case.tower, source, settings) for name in names},
            shape=shape,
            tokens=tokens,
            threads=settings.threads,
            rounds=min(settings.repeats, 3),
            burn_in=1,
            steady=False,
        )


KINDS: dict[str, Kind] = {"graph": graph, "encode": encode, "preprocess": preprocessing, "process": process}
USES_TORCH = ("graph", "encode")  # the kinds that are handed torch's towers


def _tokenizer(bundle: Bundle) -> TextTokenizer:
    bundle.tower("text")
    return TextTokenizer(bundle.tokenizer, vocab_size=bundle.vocab_size, special_ids=bundle.special_ids)


def _start(side: str, tower: str, source: str, settings: Settings) -> Sample:
    options = {
        "side": side,
        "tower": tower,
        "bundle": settings.bundle.directory,
        "precision": settings.precision,
        "threads": settings.threads,
        "input": source,
    }
    if settings.checkpoint is not None:
        options["checkpoint"] = settings.checkpoint.directory
    command = [sys.executable, "-P", "-m", "jinaclip_bench.child", *(f"--{k}={v}" for k, v in options.items())]
    start = time.monotonic()  # one clock for all processes of a machine
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        killed = "; was there enough memory?" if done.returncode < 0 else ""
        raise BenchError(f"the {side} {tower} process ended with status {done.returncode} and said: {said}{killed}")
    found = json.loads(done.stdout)
    return Sample(
        seconds=found["monotonic_s"] - start,
        output=np.array(found["vector"], np.float32),
        peak_rss_mib=found["peak_rss_mib"],
        pss_mib=found["pss_mib"],
    )
