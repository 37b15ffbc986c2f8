"""Description of the machine: processor, memory, system, versions, commit. No names of hosts or users, no paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.machine import available_threads

# Instruction sets that determine the speed of int8 and bfloat16, with their names in /proc/cpuinfo on x86 and Arm.
_INSTRUCTIONS = "avx2 avx_vnni avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16 asimddp i8mm bf16 sve sve2".split()

# Packages of the HTTP server. uvicorn uses the last two, which are faster, if they are installed.
SERVER_PACKAGES = ("uvicorn", "httptools", "uvloop")


def machine_info(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> dict[str, Any]:
    """Processor, memory and system; None for values that this system does not provide."""
    cpuinfo = _read(proc / "cpuinfo")
    flags = set(_line(cpuinfo, "flags|Features").split())
    return {
        "cpu": _line(cpuinfo, "model name") or platform.processor() or platform.machine() or None,
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "cores": available_threads(),
        "memory_gib": _memory_gib(cgroup),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def load() -> float | None:
    """Average number of runnable processes in the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str | None]:
    """Versions of Python, the compute libraries and the server's packages; None for packages not installed."""
    packages = ("jinaclip", "onnxruntime", "torch", *SERVER_PACKAGES)
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def gpu_versions(gpu: Gpu, proc: Path = Path("/proc")) -> dict[str, str | None]:
    """Version of NVIDIA's driver, and the CUDA version it supports; None for values that are not available."""
    driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _read(proc / "driver/nvidia/version"))
    return {"driver": driver[1] if driver else None, "cuda": gpu.driver}


def commit(directory: Path = Path(__file__).parent) -> str | None:
    """Commit of the checkout of this package, with "-dirty" if tracked files were changed; None outside a checkout."""
    in_checkout = _git(directory, "ls-files", "--error-unmatch", "__init__.py") is not None
    return _git(directory, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if in_checkout else None


def memory_of_this_process(proc: Path = Path("/proc/self")) -> Mapping[str, float | None]:
    """Peak resident set and current proportional set, in MiB; None on systems without these files in /proc."""
    return {
        "peak_rss_mib": _kilobytes(proc / "status", "VmHWM"),
        "pss_mib": _kilobytes(proc / "smaps_rollup", "Pss"),
    }


def resident_mib(proc: Path = Path("/proc/self")) -> float | None:
    """Current resident set in MiB; None on systems without this file in /proc."""
    return _kilobytes(proc / "status", "VmRSS")


def reset_peak(proc: Path = Path("/proc/self")) -> None:
    """Reset the peak resident set. If the system does not allow it, the peak stays that of the whole process."""
    with suppress(OSError):
        (proc / "clear_refs").write_text("5")


def cpu_seconds(pid: int, proc: Path = Path("/proc")) -> float | None:
    """CPU time of a process and its threads in seconds, with a resolution of 10 ms; None on systems without /proc."""
    try:
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()  # fields from the third on
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None


def _memory_gib(cgroup: Path) -> float | None:
    limits = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ValueError):  # no cgroup, or "max"
        limits.append(int(_read(cgroup / "memory.max")))
    return round(min(limits) / 2**30, 1) if limits else None


def _kilobytes(path: Path, field: str) -> float | None:
    number = _line(_read(path), field).partition(" ")[0]
    return round(int(number) / 1024, 1) if number else None


def _read(path: Path) -> str:
    """Content of a file, or an empty string if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _line(text: str, name: str) -> str:
    """The value after `name:` in the first line that has it, or an empty string."""
    found = re.search(rf"^(?:{name})\s*:\s*(.*?)\s*$", text, re.MULTILINE)
    return found[1] if found else ""


def _version(distribution: str) -> str | None:
    for name in (distribution, f"{distribution}-gpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
