"""Parts "study-…": our side alone, kernel by kernel and size by size: where its time goes, and which sizes run best."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import numpy as np

from jinaclip.backends.cost import PACKED_GPU_COST
from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.cases.inputs import log_normal_lengths
from jinaclip_bench.cases.table import random_ids
from tests.gpu.proof import ours
from tests.gpu.proof.context import Context
from tests.gpu.proof.fast import LONGEST, MEDIAN, MIXES, SIGMA, TOKENS, mixed_rows
from tests.gpu.proof.kernels import profiled
from tests.gpu.proof.sides import in_batches
from tests.gpu.proof.timing import in_turn

RUNS = 8  # of a size, one behind the other


def kernels(context: Context) -> None:
    """Kernels of one run of each kind."""
    bundle = Bundle(context.bundle)
    way, library = next(iter(ours.ways(context).items()))
    images = 2 if context.dry_run else 32
    with ExitStack() as stack:
        open_one = partial(ours.open_session, bundle)
        text = ours.OurSide(stack.enter_context(closing(open_one("text", library))), bundle.tower("text"))
        image = ours.OurSide(stack.enter_context(closing(open_one("image", library))), bundle.tower("image"))
        pixels = _pixels(bundle, images)
        ids = random_ids(bundle, 1, TOKENS)
        mix = _mix(bundle, 8 if context.dry_run else 512)
        for name, call in (
            (f"{way}: image {images}", lambda: image(pixels)),
            (f"{way}: mix of {len(mix)} texts", lambda: text(mix)),
            (f"{way}: image 1", lambda: image(pixels[:1])),
            (f"{way}: text 1 x {TOKENS}", lambda: text(ids)),
        ):
            profiled(context, name, call)
            _wall(context, f"{name} alone", call, 1)


def without_early_launch(context: Context) -> None:
    """One text and one image, with kernels that begin only when the one before has ended."""
    os.environ["JINACLIP_CUDA_PDL"] = "0"
    bundle = Bundle(context.bundle)
    _, library = next(iter(ours.ways(context).items()))
    for tower, values in (("text", random_ids(bundle, 1, TOKENS)), ("image", _pixels(bundle, 1))):
        with closing(ours.open_session(bundle, tower, library)) as session:
            side = ours.OurSide(session, bundle.tower(tower))
            _wall(context, f"{tower} 1 without early launch", partial(side, values), 1)


def sizes(context: Context) -> None:
    """Items a second by the size of a run; several runs behind each other, as bulk encoding asks for them."""
    bundle = Bundle(context.bundle)
    _, library = next(iter(ours.ways(context).items()))
    with closing(ours.open_session(bundle, "image", library)) as session:
        side = ours.OurSide(session, bundle.tower("image"))
        for rows in (1, 2) if context.dry_run else (1, 2, 4, 8, 16, 32, 64):
            pixels = _pixels(bundle, rows)
            _wall(context, f"images in runs of {rows}", lambda p=pixels: side.many([p] * RUNS), RUNS * rows)  # type: ignore[misc]
    with closing(ours.open_session(bundle, "text", library)) as session:
        side = ours.OurSide(session, bundle.tower("text"))
        for texts in (4, 8) if context.dry_run else (25, 50, 100, 200, 400, 800):
            mix = _mix(bundle, texts)
            tokens = int((mix != bundle.special_ids["pad"]).sum())
            _wall(context, f"tokens in runs of {tokens}", lambda m=mix: side.many([m] * RUNS), RUNS * tokens)  # type: ignore[misc]


def packing(context: Context) -> None:
    """Mixes of texts in larger and smaller runs, in turn."""
    bundle = Bundle(context.bundle)
    manifest, pad = bundle.tower("text"), bundle.special_ids["pad"]
    with ExitStack() as stack:
        sides = ours.open_all(context, bundle, "text", stack)
        for count in (24,) if context.dry_run else MIXES:
            rows = mixed_rows(count, bundle.vocab_size)
            count_of_tokens = sum(map(len, rows))
            for way, side in sides.items():
                calls = {}
                for tokens, padding in ((16384, 0.007), (16384, 0.001), (32768, 0.001)):
                    cost = replace(PACKED_GPU_COST, tokens=tokens, padding=padding)
                    batches, places = in_batches(rows, manifest, pad, cost)
                    name = f"{way}: {count} texts in runs of {cost.tokens}, {cost.padding} a place"
                    calls[f"{name}: {len(batches)}"] = partial(side.many, batches, places)
                for call in calls.values():
                    for _ in range(4):
                        call()
                        time.sleep(0.02)  # in which shapes are captured
                for name, times in in_turn(calls, seconds=2.0).items():
                    summary = times.summary()
                    context.record(name, **summary, tokens_s=round(count_of_tokens / summary["ms"] * 1e3, 1))


def _wall(context: Context, name: str, call: Callable[[], object], items: int) -> None:
    for _ in range(4):
        call()
        time.sleep(0.01)  # a shape is captured behind its second run
    times: list[float] = []
    end = time.perf_counter() + 0.7
    while len(times) < 5 or (len(times) < 200 and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    p10, p50, p90 = (float(value) * 1e3 for value in np.percentile(times, (10, 50, 90)))
    context.record(name, ms=round(p50, 3), p10=round(p10, 3), p90=round(p90, 3), per_s=round(items / p50 * 1e3, 1))


def _pixels(bundle: Bundle, rows: int) -> np.ndarray:
    size = bundle.preprocessing.size
    return np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)


def _mix(bundle: Bundle, texts: int) -> np.ndarray:
    """int64 [texts, T] of log-normal lengths, padded."""
    lengths = log_normal_lengths(texts, MEDIAN, SIGMA, LONGEST)
    ids = random_ids(bundle, texts, int(max(lengths)))
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1 : length] = bundle.special_ids["eos"]
        row[length:] = bundle.special_ids["pad"]
    return ids
