"""Part "smoke": a small random model opens on the GPU, runs, is captured and replayed, and agrees with the CPU."""

from __future__ import annotations

import time

import numpy as np

from jinaclip import ClipModel
from jinaclip.cli import main
from jinaclip_bench.cases import random_ids
from tests.gpu.proof import random_bundle
from tests.gpu.proof.context import Context
from tests.gpu.proof.timing import cosines

ENOUGH = 0.9999  # cosine of fp16 with fp32


def run(context: Context) -> None:
    directory = context.work / "smoke"
    seconds = random_bundle.make(context.work / "kit" / "graphs" / "small", directory, context.device)
    context.record("bundle", **seconds)
    start = time.monotonic()
    if main(["build", str(directory / "bundle"), "--device", "cuda"]) != 0:
        raise SystemExit("jinaclip build --device cuda failed; its reason stands above")
    context.record("build", seconds=round(time.monotonic() - start, 2))
    start = time.monotonic()
    settings = {"backend": "onnxruntime", "device": "cuda", "precision": "fp16"}
    with (
        ClipModel(directory / "bundle", self_test="always", **settings) as model,  # type: ignore[arg-type]
        ClipModel(directory / "bundle", device="cpu", precision="fp32") as reference,
    ):
        towers = model.info()["towers"]
        context.record("open", seconds=round(time.monotonic() - start, 2), towers=towers)
        ids = random_ids(model.bundle, 5, 21)
        ids[1:3, 9:] = model.bundle.special_ids["pad"]
        size = model.bundle.preprocessing.size
        pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
        worst = 1.0
        for tower, values, least in (("text", ids, 8), ("image", pixels, 2)):
            name = model.bundle.tower(tower).input_name
            expected = reference.session(tower).run({name: values})[f"l2norm_{tower}_embeddings"]
            session = model.session(tower)
            runs = [session.run({name: values})[f"l2norm_{tower}_embeddings"] for _ in range(5)]
            one = session.run({name: values[:1]})[f"l2norm_{tower}_embeddings"]
            many = np.concatenate([values] * least)  # more rows than are captured
            last = session.run({name: many})[f"l2norm_{tower}_embeddings"][-1:]
            found = {
                "cosine": float(cosines(runs[0], expected).min()),
                "replays_apart": max(float(np.abs(found - runs[0]).max()) for found in runs[1:]),
                "one_row": float(cosines(one, expected[:1]).min()),
                "many_rows": float(cosines(last, expected[-1:]).min()),
            }
            context.record(tower, **found)
            worst = min(worst, found["cosine"], found["one_row"], found["many_rows"])
    if not context.dry_run and not worst >= ENOUGH:
        raise SystemExit(f"the GPU's vectors are not the CPU's: cosine {worst:.6f}, expected at least {ENOUGH}")
