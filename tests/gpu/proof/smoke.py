"""Part "smoke": a small random model opens on the GPU, runs, is captured and replayed, and agrees with the CPU."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from jinaclip import ClipModel
from jinaclip_bench.cases.table import random_ids
from tests.gpu.proof import ours, random_bundle
from tests.gpu.proof.build import build
from tests.gpu.proof.context import Context
from tests.gpu.proof.timing import cosines

ENOUGH = 0.9998  # cosine of fp16 with fp32


def run(context: Context) -> None:
    ours.clear_marks(context)
    directory = context.work / "smoke"
    seconds = random_bundle.make(context.work / "kit" / "graphs" / "small", directory, context.weights_device)
    context.record("bundle", **seconds)
    failed = []
    for way, library in ours.ways(context).items():
        try:
            _check(context, way, library, directory / "bundle")
        except Exception as error:
            failed.append(f"{way}: {type(error).__name__}: {error}")
            ours.leave_out(context, way, failed[-1])
    if failed:
        raise SystemExit("; ".join(failed))


def _check(context: Context, way: str, library: Path | None, bundle: Path) -> None:
    start = time.monotonic()
    for tower in ("text", "image"):
        if any(build(bundle, tower, [library], context.dry_run)):
            raise RuntimeError(f"jinaclip build --device cuda failed for {tower}; its reason stands in smoke.log")
    ours.choose(library)
    with (
        ClipModel(bundle, backend="onnxruntime", device="cuda", precision="fp16", self_test="always") as model,
        ClipModel(bundle, device="cpu", precision="fp32") as reference,
    ):
        context.record(f"{way}: open", seconds=round(time.monotonic() - start, 2), towers=model.info()["towers"])
        ids = random_ids(model.bundle, 5, 21)
        ids[1:3, 9:] = model.bundle.special_ids["pad"]
        size = model.bundle.preprocessing.size
        pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
        worst = 1.0
        for tower, values, times in (("text", ids, 64), ("image", pixels, 3)):
            name, output = model.bundle.tower(tower).input_name, f"l2norm_{tower}_embeddings"
            expected = reference.encoders[tower].session.run({name: values})[output]
            session = model.encoders[tower].session
            runs = [session.run({name: values})[output] for _ in range(5)]
            one = session.run({name: values[:1]})[output]
            last = session.run({name: np.concatenate([values] * times)})[output][-1:]  # more rows than are captured
            found = {
                "cosine": float(cosines(runs[0], expected).min()),
                "replays_apart": max(float(np.abs(found - runs[0]).max()) for found in runs[1:]),
                "one_row": float(cosines(one, expected[:1]).min()),
                "many_rows": float(cosines(last, expected[-1:]).min()),
            }
            context.record(f"{way}: {tower}", **found)
            worst = min(worst, found["cosine"], found["one_row"], found["many_rows"])
    if not context.dry_run and not worst >= ENOUGH:
        raise RuntimeError(f"the GPU's vectors are not the CPU's: cosine {worst:.6f}, expected at least {ENOUGH}")
