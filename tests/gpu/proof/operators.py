"""Parts "operators" and "sanitizer-…": the CUDA operators against numpy, and under tools of compute-sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.proof.context import Context
from tests.gpu.proof.kit import OPERATORS
from tests.support.from_checkout import ROOT

SCRIPT = ROOT / "tests" / "gpu" / "check_operators.py"


def run(context: Context) -> None:
    _check(context)


def memcheck(context: Context) -> None:
    """Accesses outside an allocation, misaligned accesses, errors of the CUDA API."""
    _sanitizer(context, "memcheck", "--error-exitcode", "9")


def racecheck(context: Context) -> None:
    """Accesses to shared memory that no barrier orders. Races in kernels of others are ignored: it reports those of
    cuBLAS for Hopper. With only our kernels instrumented (--kernel-name), a product of cuBLAS failed.
    """
    log = context.file(f"{context.part}.txt")
    _sanitizer(context, "racecheck", "--log-file", str(log))
    races = races_of_ours(log.read_text("utf-8", "replace")) if log.is_file() else []
    context.record("races", of_ours=len(races))
    if races:
        raise SystemExit(races[0])


def synccheck(context: Context) -> None:
    """Barriers that are used in an invalid way."""
    _sanitizer(context, "synccheck", "--error-exitcode", "9")


def races_of_ours(log: str) -> list[str]:
    """The races in jinaclip's kernels that racecheck reported."""
    return [line.strip("= ") for line in log.splitlines() if "Race reported" in line and "jinaclip::" in line]


def _sanitizer(context: Context, tool: str, *options: str) -> None:
    """The small shapes, and a captured graph."""
    places = [shutil.which("compute-sanitizer"), *map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    found = next((place for place in places if place and Path(place).is_file()), None)
    if found is None:
        context.record("result", state="compute-sanitizer is not here")
        return
    _check(context, [found, "--tool", tool, *options], ["--small"])


def _check(context: Context, before: Sequence[str] = (), options: Sequence[str] = ()) -> None:
    library = context.work / "kit" / OPERATORS
    missing = [path.name for path in (library, SCRIPT) if not path.is_file()]
    if missing:
        context.record("result", state=f"left out: there is no {' and no '.join(missing)}")
        return
    output = context.file(f"{context.part}.jsonl")
    seconds = f"{max(1.0, context.left() - 5):.0f}"
    command = [*before, sys.executable, str(SCRIPT), "--library", str(library), "--output", str(output)]
    command += ["--seconds", seconds, *options]
    code = subprocess.run(command, cwd=ROOT, timeout=max(1.0, context.left() - 1)).returncode
    context.record("result", state="ok" if code == 0 else f"exit {code}")
    if code and not context.dry_run:
        raise SystemExit(f"{SCRIPT.name} ended with {code}; see the log")
