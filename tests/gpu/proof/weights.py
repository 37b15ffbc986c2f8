"""Part "weights": the full-size model with random weights, its bundle, and `jinaclip build --device cuda`."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from jinaclip.bundle.manifest import TOWERS
from tests.gpu.proof import ours, random_bundle
from tests.gpu.proof.build import build
from tests.gpu.proof.context import Context


def run(context: Context) -> None:
    start = time.monotonic()
    (context.model / "whole").unlink(missing_ok=True)
    seconds = random_bundle.make(context.work / "kit" / "graphs" / context.size, context.model, context.weights_device)
    context.record("bundle", seconds=round(time.monotonic() - start, 1), **seconds)
    start = time.monotonic()
    found = ours.ways(context)
    libraries = list(found.values())
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(build, context.bundle, tower, libraries, context.dry_run) for tower in TOWERS]
        codes = [future.result() for future in futures]
    (context.model / "whole").touch()
    by_way = {way: [code[number] for code in codes] for number, way in enumerate(found)}
    context.record("build", seconds=round(time.monotonic() - start, 1), codes=by_way)
    for way, found_codes in by_way.items():
        if any(found_codes):
            ours.leave_out(context, way, f"jinaclip build --device cuda: exit codes {found_codes}")
    if any(code for found_codes in by_way.values() for code in found_codes):
        raise SystemExit(f"jinaclip build --device cuda: exit codes {by_way}; the reason stands above")


def run_if_missing(context: Context) -> None:
    """The model of an earlier pass, where it is still there."""
    if (context.model / "whole").is_file():
        context.record("bundle", seconds=0.0, state="there already")
    else:
        run(context)
