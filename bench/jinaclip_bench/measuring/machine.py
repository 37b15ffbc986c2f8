"""What a figure was measured on: processor, memory, system, versions, commit. No names of hosts, users or paths."""

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

# What decides how fast int8 and bfloat16 are, as /proc/cpuinfo calls it on x86 and on Arm.
_INSTRUCTIONS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip

# What a server reads and answers HTTP with: uvicorn takes the last two where they are installed, which is quicker.
SERVE = ("uvicorn", "httptools", "uvloop")


def machine_facts(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> dict[str, Any]:
    """Processor, memory and system; None for what this system does not tell."""
    try:
        cpuinfo = (proc / "cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    flags = set(_line(cpuinfo, "flags|Features").split())
    return {
        "cpu": _line(cpuinfo, "model name") or platform.processor() or platform.machine() or None,
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "cores": available_threads(),
        "memory_gib": _memory_gib(cgroup),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def load() -> float | None:
    """Runnable processes of the last minute, on average."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str | None]:
    """Of python, of what computes and of what serves; None for what is not installed."""
    found = {name: _version(name) for name in ("jinaclip", "onnxruntime", "torch", *SERVE)}
    return {"python": platform.python_version(), **found}


def gpu_versions(gpu: Gpu, proc: Path = Path("/proc")) -> dict[str, str | None]:
    """NVIDIA's driver, and the CUDA that it serves; None for what this system does not tell."""
    try:
        text = (proc / "driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return {"driver": found[1] if found else None, "cuda": gpu.driver}


def commit(directory: Path = Path(__file__).parent) -> str | None:
    """Commit of the checkout that this package runs from, with "-dirty" if tracked files differ; None elsewhere."""
    in_checkout = _git(directory, "ls-files", "--error-unmatch", "__init__.py") is not None
    return _git(directory, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if in_checkout else None


def memory_of_this_process(proc: Path = Path("/proc/self")) -> Mapping[str, float | None]:
    """Peak of the resident set, and the proportional set now, in MiB; None where there is no such /proc."""
    return {
        "peak_rss_mib": _kilobytes(proc / "status", "VmHWM"),
        "pss_mib": _kilobytes(proc / "smaps_rollup", "Pss"),
    }


def resident_mib(proc: Path = Path("/proc/self")) -> float | None:
    """The resident set now; None where there is no such /proc."""
    return _kilobytes(proc / "status", "VmRSS")


def restart_peak(proc: Path = Path("/proc/self")) -> None:
    """Let the peak of the resident set count from now. Where the system refuses, it stays the process's highest."""
    with suppress(OSError):
        (proc / "clear_refs").write_text("5")


def cpu_seconds(pid: int, proc: Path = Path("/proc")) -> float | None:
    """CPU that a process has used, its threads included, in steps of 10 ms; None where there is no such /proc."""
    try:
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()  # from the third on
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None


def _memory_gib(cgroup: Path) -> float | None:
    limits = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        limits.append(int((cgroup / "memory.max").read_text()))
    return round(min(limits) / 2**30, 1) if limits else None


def _kilobytes(path: Path, field: str) -> float | None:
    try:
        return round(int(_line(path.read_text(), field).split()[0]) / 1024, 1)
    except (OSError, IndexError):
        return None


def _line(text: str, name: str) -> str:
    """What stands behind `name:` in the first such line, or nothing."""
    found = re.search(rf"^(?:{name})\s*:\s*(.*?)\s*$", text, re.MULTILINE)
    return found[1] if found else ""


def _version(distribution: str) -> str | None:
    for name in (distribution, f"{distribution}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
