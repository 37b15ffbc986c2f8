"""Resources of this machine: cores, CPU features and free memory."""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

# CPU features that determine which kernels run and how their weights are packed, by the names of the Linux kernel.
_FEATURES = frozenset(
    "avx avx2 fma f16c avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16 "
    "asimd asimddp asimdhp i8mm bf16 sve sve2".split()
)


def available_threads() -> int:
    """Number of cores that this process may use, by its CPU affinity and its cgroup's CPU quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cores, math.ceil(quota) if quota else cores))


def cgroup_quota(root: Path) -> float | None:
    """CPU quota of the cgroup (version 2 or 1), as a number of CPUs; None without a limit."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):
            quota, period = " ".join((root / name).read_text() for name in names).split()
            return None if quota in ("max", "-1") or int(period) <= 0 else int(quota) / int(period)
    return None


@cache
def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Instruction sets that kernels are chosen by, sorted. The processor's name if they are not known."""
    flags = _first_value(cpuinfo, "flags", "Features")
    return tuple(sorted(_FEATURES & set(flags.split()))) if flags else (platform.processor() or platform.machine(),)


@cache
def cpu_model() -> str:
    """Name of the CPU; its architecture if the name is not known."""
    return _first_value(Path("/proc/cpuinfo"), "model name") or platform.machine()


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be allocated without swapping, limited by the machine and the cgroup; None if not known."""
    limits = []
    if available := _first_value(proc / "meminfo", "MemAvailable"):  # "4096 kB"
        limits.append(int(available.split()[0]) * 1024)
    with suppress(OSError, ValueError):
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            limits.append(max(0, int(limit) - int((cgroup / "memory.current").read_text())))
    if not limits and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def _first_value(path: Path, *names: str) -> str | None:
    """The value of the first line `name: value` with one of these names; None if there is none."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    return None
