"""Parts "variants-…": graphs of one bundle that are prepared in different ways, against each other.

A variant is a name in VARIANTS and what writes its graph; one that cannot be made is recorded as an error
and left out.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from jinaclip.backends.cuda.gpu import gpu
from jinaclip.backends.onnxruntime.cuda import OnnxRuntimeCudaSession
from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.cases.table import random_ids
from jinaclip_bench.scenarios.flops import flops_of_images, flops_of_texts
from jinaclip_engines.graph import forget_shapes, read, tidy, write
from jinaclip_engines.passes.onnxruntime_cuda.pipeline import OPERATOR_PASSES, PASSES, for_cuda
from jinaclip_export.checkpoint.reader import Checkpoint
from tests.gpu.proof.context import Context
from tests.gpu.proof.fast import TOKENS, compare, in_mix, mixed_rows
from tests.gpu.proof.kit import OPERATORS
from tests.gpu.proof.ours import OurSide

Rewrite = Callable[[ir.Model, int], object]  # a bundle's fp16 graph and its attention heads


def _unpacked(model: ir.Model, heads: int) -> None:
    """Our operators, texts with their padding."""
    for name, step in (PASSES | OPERATOR_PASSES).items():
        if name != "packed_text":
            step(model, heads)
            tidy(model)
    forget_shapes(model)


def _unprepared(model: ir.Model, heads: int) -> None:
    """The bundle's own graph."""


# By name: what rewrites the graph, and whether it has our operators then.
VARIANTS: Mapping[str, tuple[Rewrite, bool]] = {
    "operators": (partial(for_cuda, operators=True), True),
    "operators, padded texts": (_unpacked, True),
    "plain": (for_cuda, False),
    "unprepared": (_unprepared, False),
}


def image_32(context: Context) -> None:
    bundle = Bundle(context.bundle)
    manifest, config = bundle.tower("image"), Checkpoint(context.model / "checkpoint").config.image
    size, rows = bundle.preprocessing.size, 2 if context.dry_run else 32
    pixels = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)
    with ExitStack() as stack:
        sides = _open(context, bundle, "image", stack)
        for count in (rows, 1):
            work = {"images": count, "flops": flops_of_images(manifest, count, config)}
            calls = {name: partial(side, pixels[:count]) for name, side in sides.items()}
            compare(context, f"image {count}", calls, (), work, share=0.6 if count > 1 else 1.0)


def text(context: Context) -> None:
    bundle = Bundle(context.bundle)
    manifest, pad = bundle.tower("text"), bundle.special_ids["pad"]
    one = random_ids(bundle, 1, TOKENS)
    rows = mixed_rows(24 if context.dry_run else 1024, bundle.vocab_size)
    lengths = [len(row) for row in rows]
    with ExitStack() as stack:
        sides = _open(context, bundle, "text", stack)
        work = {"texts": 1, "tokens": TOKENS, "flops": flops_of_texts(manifest, [TOKENS])}
        calls = {name: partial(side, one) for name, side in sides.items()}
        compare(context, f"text 1 x {TOKENS}", calls, (), work, share=0.4)
        work = {"texts": len(rows), "tokens": sum(lengths), "flops": flops_of_texts(manifest, lengths)}
        mixes = {name: in_mix(side, rows, manifest, pad) for name, side in sides.items()}
        compare(context, f"mix of {len(rows)}", mixes, (), work)


def _open(context: Context, bundle: Bundle, tower: str, stack: ExitStack) -> dict[str, OurSide]:
    """By variant: a session of its graph."""
    pad = bundle.special_ids["pad"] if tower == "text" else 0
    sides = {}
    for name, (rewrite, with_operators) in VARIANTS.items():
        folder = context.work / "variants" / f"{tower}-{name.replace(', ', '-').replace(' ', '-')}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.monotonic()
        try:
            model = read(bundle.graph(tower, "fp16"))
            rewrite(model, bundle.tower(tower).heads)
            write(model, folder / "graph.onnx")
            session = OnnxRuntimeCudaSession(
                folder / "graph.onnx", gpu=gpu(), prepared=name, pad=pad, operators=_library(context, with_operators)
            )
        except Exception as error:  # the other variants can be measured all the same
            context.record(f"{tower}: {name}", error=f"{type(error).__name__}: {error}"[:500])
            continue
        stack.enter_context(closing(session))
        context.record(f"{tower}: {name}", seconds=round(time.monotonic() - start, 1))
        sides[name] = OurSide(session, bundle.tower(tower))
    return sides


def _library(context: Context, wanted: bool) -> Path | None:
    library = context.work / "kit" / OPERATORS
    if wanted and not library.is_file():
        raise RuntimeError(f"the kit has no {OPERATORS}")
    return library if wanted else None
