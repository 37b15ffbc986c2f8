"""Measure the device's stages in one call, with CUPTI through torch's profiler.

The profiler sees all device work of the process. It therefore works the same for every backend, with or without CUDA
graphs, and sessions need no measuring code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

Stages = Mapping[str, float | None]  # seconds; None if not available
DEVICE_STAGES = ("copy in", "run", "copy out")
UNAVAILABLE: Stages = dict.fromkeys(DEVICE_STAGES)


def device_stages(call: Callable[[], object]) -> Stages:
    """Profile a call that waits for the device. Returns its stages, all None if the driver does not allow profiling."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
    return stages_of(
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    )


def stages_of(events: Iterable[tuple[str, float, float]]) -> Stages:
    """Compute the stages from events (name, begin, end), with CUPTI's names and times in seconds.

    "copy in" and "copy out" are sums of the durations. "run" is the time from the first kernel's begin to the last
    kernel's end, gaps included.
    """
    copied = {"copy in": 0.0, "copy out": 0.0}
    kernels = []
    for name, begin, end in events:
        if name.startswith("Memcpy HtoD"):
            copied["copy in"] += end - begin
        elif name.startswith("Memcpy DtoH"):
            copied["copy out"] += end - begin
        elif not name.startswith(("Memcpy", "Memset")):
            kernels.append((begin, end))
    if not kernels:
        return UNAVAILABLE
    run = max(end for _, end in kernels) - min(begin for begin, _ in kernels)
    return {"copy in": copied["copy in"] or None, "run": run, "copy out": copied["copy out"] or None}
