"""Parts "kernels-…": where the device's time goes, kernel by kernel, with the gaps between them.

torch's profiler records what any library of the process runs on the GPU, replays of CUDA graphs included.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.cases.table import random_ids
from tests.gpu.proof.context import Context
from tests.gpu.proof.fast import TOKENS
from tests.gpu.proof.ours import open_all
from tests.gpu.proof.sides import image_sides, text_sides
from tests.gpu.proof.towers import image_tower, text_tower

TOP = 14  # kernels that are listed
CALLS = 5


def image_32(context: Context) -> None:
    bundle = Bundle(context.bundle)
    size = bundle.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (2 if context.dry_run else 32, size, size, 3), np.uint8)
    _ours(context, bundle, "image", pixels)
    tower = image_tower(context.model / "checkpoint", context.device, torch.float16)
    sides = dict(image_sides(tower, bundle.preprocessing, context.device, len(pixels)))
    profiled(context, "torch-fp16-compiled", partial(sides["torch-fp16-compiled"](), pixels))


def text_1(context: Context) -> None:
    bundle = Bundle(context.bundle)
    ids = random_ids(bundle, 1, TOKENS)
    _ours(context, bundle, "text", ids)
    tower = text_tower(context.model / "checkpoint", context.device, torch.float16)
    sides = dict(text_sides(tower, context.device, dynamic=False))
    name = "torch-fp16-compiled-graph" if context.device != "cpu" else "torch-fp16-compiled"
    profiled(context, name, partial(sides[name](), ids))


def _ours(context: Context, bundle: Bundle, tower: str, values: np.ndarray) -> None:
    with ExitStack() as stack:
        for way, side in open_all(context, bundle, tower, stack).items():
            try:
                profiled(context, way, partial(side, values))
            except Exception as error:  # the other sides are still profiled
                context.record(f"{way} failed", error=f"{type(error).__name__}: {error}"[:500])


def profiled(context: Context, name: str, call: Callable[[], np.ndarray]) -> None:
    """Record what the device does in a call."""
    for _ in range(6):
        call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.device != "cpu" else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        wall = (time.perf_counter() - start) / CALLS
    path = context.file(f"{context.part}-{name.replace(' ', '-')}.json")
    profiler.export_chrome_trace(str(path))
    events = _device_events(json.loads(path.read_text("utf-8")))
    with path.open("rb") as source, gzip.open(f"{path}.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    path.unlink()
    context.record(name, wall_ms=round(wall * 1e3, 3), **_summary(events))


def _device_events(trace: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Name, beginning and length in µs of what ran on the device, in order."""
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [
        (str(event["name"]), float(event["ts"]), float(event["dur"]))
        for event in trace.get("traceEvents", ())
        if event.get("cat") in wanted and "dur" in event
    ]
    return sorted(events, key=lambda event: event[1])


def _summary(events: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """Per call: launches, busy time, gaps between two of them, and the kernels that take longest."""
    kernels: dict[str, list[float]] = {}
    busy = gaps = 0.0
    within = []
    end = None
    for name, start, length in events:
        kernels.setdefault(short_name(name), []).append(length)
        busy += length
        if end is not None and start > end:
            gap = start - end
            if gap < 200:  # longer ones lie between two calls
                gaps += gap
                within.append(gap)
        end = start + length if end is None else max(end, start + length)
    rows = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    return {
        "launches": round(len(events) / CALLS, 1),
        "busy_ms": round(busy / CALLS / 1e3, 4),
        "gaps_ms": round(gaps / CALLS / 1e3, 4),
        "median_gap_us": round(float(np.median(within)), 2) if within else None,
        "kernels": [
            {"name": name, "calls": round(len(found) / CALLS, 1), "ms": round(sum(found) / CALLS / 1e3, 4),
             "mean_us": round(sum(found) / len(found), 2), "share": round(sum(found) / busy, 4)}
            for name, found in rows[:TOP]
        ],
        "others_ms": round(sum(sum(found) for _, found in rows[TOP:]) / CALLS / 1e3, 4),
    }  # fmt: skip


def short_name(name: str) -> str:
    """A kernel's name without its arguments, in at most 90 characters."""
    bare = re.sub(r"^void ", "", name.replace("(anonymous namespace)::", ""))
    bare = bare.replace("onnxruntime::", "").replace("contrib::", "").split("(")[0]
    return bare if len(bare) <= 90 else f"{bare[:60]}…{bare[-29:]}"
