"""What the device does in one call, whoever called it: CUPTI, through torch's profiler, sees all of a process's work.

So every session is told apart in the same way, with CUDA graphs or without, and none has to measure itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

Stages = Mapping[str, float | None]  # seconds; None: not told
DEVICE_STAGES = ("copy in", "run", "copy out")
NOT_TOLD: Stages = dict.fromkeys(DEVICE_STAGES)


def device_stages(call: Callable[[], object]) -> Stages:
    """Run a call that waits for the device, and tell its stages there; all None where the driver lets nobody look."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
    return stages_of(
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    )


def stages_of(events: Iterable[tuple[str, float, float]]) -> Stages:
    """Stages of (name, begin, end) in seconds, by CUPTI's names.

    Copies are the sums of their times. "run" is from the first kernel's begin to the last one's end, what lies between
    included.
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
        return NOT_TOLD
    run = max(end for _, end in kernels) - min(begin for begin, _ in kernels)
    return {"copy in": copied["copy in"] or None, "run": run, "copy out": copied["copy out"] or None}
