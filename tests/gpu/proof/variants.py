"""Parts "variants-…": graphs of one bundle that are prepared in different ways, against each other.

A variant is a name in VARIANTS and what writes its graph; one that cannot be made is told and left out.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.bundle import Bundle
from jinaclip.gpu import gpu
from jinaclip.onnxruntime_cuda import OnnxRuntimeCudaSession
from jinaclip.prepared import find_prepared
from jinaclip_bench.cases import random_ids
from jinaclip_bench.flops import flops_of_images, flops_of_texts
from jinaclip_bench.texts import log_normal_lengths
from jinaclip_engines.cuda import for_cuda
from jinaclip_engines.graph import read, write
from jinaclip_export.checkpoint import Checkpoint
from tests.gpu.proof.context import Context
from tests.gpu.proof.fast import LONGEST, MEDIAN, SIGMA, TOKENS
from tests.gpu.proof.sides import in_batches, session_side
from tests.gpu.proof.timing import cosines, in_turn, product_rate

# Bundle, tower, empty folder -> the graph, in the folder or elsewhere
Write = Callable[[Bundle, str, Path], Path]


def _built(bundle: Bundle, tower: str, folder: Path) -> Path:
    """What `jinaclip build --device cuda` made."""
    found, reason = find_prepared(bundle, tower, "fp16", "cuda")
    if found is None:
        raise RuntimeError(reason)
    return found.path


def _unprepared(bundle: Bundle, tower: str, folder: Path) -> Path:
    return bundle.graph(tower, "fp16")


def _passes(bundle: Bundle, tower: str, folder: Path) -> Path:
    """The passes over ONNX Runtime's own operators."""
    model = read(bundle.graph(tower, "fp16"))
    for_cuda(model, bundle.tower(tower).heads)
    write(model, folder / "graph.onnx")
    return folder / "graph.onnx"


VARIANTS: Mapping[str, Write] = {"built": _built, "unprepared": _unprepared, "passes": _passes}


def image_32(context: Context) -> None:
    bundle = Bundle(context.bundle)
    size, rows = bundle.preprocessing.size, 2 if context.dry_run else 32
    pixels = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)
    config = Checkpoint(context.model / "checkpoint").config.image
    with ExitStack() as stack:
        sides = _open(context, bundle, "image", stack)
        flops = flops_of_images(bundle.tower("image"), rows, config)
        _compare(context, f"image {rows}", sides, lambda embed: embed(pixels), {"images": rows}, flops)
        flops = flops_of_images(bundle.tower("image"), 1, config)
        _compare(context, "image 1", sides, lambda embed: embed(pixels[:1]), {"images": 1}, flops)


def text(context: Context) -> None:
    bundle = Bundle(context.bundle)
    manifest, pad = bundle.tower("text"), bundle.special_ids["pad"]
    one = random_ids(bundle, 1, TOKENS)
    lengths = log_normal_lengths(24 if context.dry_run else 1024, MEDIAN, SIGMA, LONGEST)
    rows = [[int(i) for i in random_ids(bundle, 1, length)[0]] for length in lengths]
    with ExitStack() as stack:
        sides = _open(context, bundle, "text", stack)
        work = {"texts": 1, "tokens": TOKENS}
        _compare(context, f"text 1 x {TOKENS}", sides, lambda e: e(one), work, flops_of_texts(manifest, [TOKENS]))
        work = {"texts": len(rows), "tokens": sum(lengths)}
        call = partial(in_batches, rows, manifest, pad)
        _compare(context, f"mix of {len(rows)}", sides, call, work, flops_of_texts(manifest, lengths))


def _open(
    context: Context, bundle: Bundle, tower: str, stack: ExitStack
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """By variant: a session that ran."""
    pad = bundle.special_ids["pad"] if tower == "text" else 0
    sides = {}
    for name, write_graph in VARIANTS.items():
        folder = context.work / "variants" / f"{tower}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.monotonic()
        try:
            path = write_graph(bundle, tower, folder)
            session = stack.enter_context(closing(OnnxRuntimeCudaSession(path, gpu=gpu(), prepared=name, pad=pad)))
        except Exception as error:  # the other variants can be measured all the same
            context.record(f"{tower}: {name}", error=f"{type(error).__name__}: {error}"[:500])
            continue
        context.record(f"{tower}: {name}", seconds=round(time.monotonic() - start, 1))
        sides[name] = session_side(session, bundle.tower(tower))
    return sides


def _compare(
    context: Context, case: str, sides: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    call: Callable[[Callable[[np.ndarray], np.ndarray]], np.ndarray], work: Mapping[str, int], flops: int,
) -> None:  # fmt: skip
    calls, expected = {}, None
    for name, embed in sides.items():
        try:
            for _ in range(4):
                found = call(embed)
        except Exception as error:
            context.record(f"{case}: {name}", error=f"{type(error).__name__}: {error}"[:500])
            continue
        expected = found if expected is None else expected
        context.record(f"{case}: {name} vectors", cosine=float(cosines(found, expected).min()))
        calls[name] = partial(call, embed)
    rate = product_rate(context.device)
    for name, times in in_turn(calls, seconds=min(8.0, context.left() / 3), least=3).items():
        summary = times.summary()
        facts: dict[str, Any] = {f"{unit}_s": round(n / summary["ms"] * 1e3, 1) for unit, n in work.items()}
        if rate:
            facts |= {"tflops": round(flops / summary["ms"] / 1e9, 1), "share": flops / summary["ms"] / 1e9 / rate}
        context.record(f"{case}: {name}", **summary, **facts)
