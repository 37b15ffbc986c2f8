"""Part "machine": what is here, and the two speeds that everything else is held against."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version

import numpy as np
import torch

from tests.gpu.proof.context import Context
from tests.gpu.proof.timing import product_rate

PACKAGES = ("torch", "triton", "numpy", "onnx", "onnx-ir", "onnxruntime-gpu", "cuda-bindings", "nvidia-cudnn-cu13")
COPIED = 1 << 30  # bytes
QUERY = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,power.limit,temperature.gpu,compute_mode"


def run(context: Context) -> None:
    found = {}
    for name in PACKAGES:
        with suppress(Exception):
            found[name] = version(name)
    shared = shutil.disk_usage("/dev/shm").free >> 30 if os.path.isdir("/dev/shm") else 0
    context.record(
        "versions", python=sys.version.split()[0], cores=os.cpu_count(), shared_memory_gib=shared,
        libraries=os.environ.get("LD_LIBRARY_PATH", ""), **found,
    )  # fmt: skip
    with suppress(OSError, subprocess.SubprocessError):
        for name, words in (("nvidia-smi", []), ("nvidia-smi-query", [f"--query-gpu={QUERY}", "--format=csv"])):
            said = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=10).stdout
            context.file(f"{name}.txt").write_text(said, "utf-8")
            if words and len(said.splitlines()) > 1:
                context.record("gpu", smi=said.splitlines()[1])
    import onnxruntime

    context.record(
        "onnxruntime", version=onnxruntime.__version__, file=onnxruntime.__file__,
        providers=onnxruntime.get_available_providers(),
    )  # fmt: skip
    if context.device == "cpu":
        return
    first = product_rate(context.device)
    context.record("product", tflops=round(first or 0.0, 1), dtype="float16", size=8192)
    context.record("copies", **{name: round(value, 1) for name, value in _copies().items()})
    again = product_rate(context.device)
    context.record("product", tflops=round(again or 0.0, 1), first=round(first or 0.0, 1), dtype="float16", size=8192)


def _copies() -> dict[str, float]:
    """GB/s: on the device, read and written bytes counted; from and to pinned memory of the host."""
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    host = torch.empty(COPIED // 4, dtype=torch.uint8, pin_memory=True)
    pairs = {
        "device_gb_s": (target, source, 2 * COPIED),
        "upload_gb_s": (target[: len(host)], host, len(host)),
        "download_gb_s": (host, target[: len(host)], len(host)),
    }
    return {name: size / _seconds(to, of) / 1e9 for name, (to, of, size) in pairs.items()}


def _seconds(to: torch.Tensor, of: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times = []
    for _ in range(6):
        begin.record()
        to.copy_(of, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(np.median(times[1:]))
