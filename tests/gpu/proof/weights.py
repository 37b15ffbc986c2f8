"""Part "weights": the full-size model with random weights, its bundle, and `jinaclip build --device cuda`."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from jinaclip.bundle import TOWERS
from tests.gpu.proof import random_bundle
from tests.gpu.proof.build import build
from tests.gpu.proof.context import Context


def run(context: Context) -> None:
    start = time.monotonic()
    (context.model / "whole").unlink(missing_ok=True)
    seconds = random_bundle.make(context.work / "kit" / "graphs" / context.size, context.model, context.device)
    context.record("bundle", seconds=round(time.monotonic() - start, 1), **seconds)
    start = time.monotonic()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        codes = dict(zip(TOWERS, pool.map(build, [context.bundle] * 2, TOWERS, [context.dry_run] * 2), strict=True))
    context.record("build", seconds=round(time.monotonic() - start, 1), codes=codes)
    (context.model / "whole").touch()
    if any(codes.values()):
        raise SystemExit(f"jinaclip build --device cuda: exit codes {codes}; the reason stands above")


def run_if_missing(context: Context) -> None:
    """The model of an earlier pass, where it is still there."""
    if (context.model / "whole").is_file():
        context.record("bundle", seconds=0.0, state="there already")
    else:
        run(context)
