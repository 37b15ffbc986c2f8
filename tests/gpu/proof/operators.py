"""Parts "operators" and "sanitizer": our own CUDA operators against numpy, and under compute-sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.gpu.proof.context import Context
from tests.gpu.proof.kit import OPERATORS
from tests.support.from_checkout import ROOT

SCRIPT = ROOT / "tests" / "gpu" / "check_operators.py"


def run(context: Context) -> None:
    _check(context, [])


def sanitizer(context: Context) -> None:
    places = [shutil.which("compute-sanitizer"), *map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    found = next((place for place in places if place and Path(place).is_file()), None)
    if found is None:
        context.record("result", state="compute-sanitizer is not here")
        return
    _check(context, [found, "--tool", "memcheck", "--error-exitcode", "9"])


def _check(context: Context, before: list[str]) -> None:
    library = context.work / "kit" / OPERATORS
    missing = [path.name for path in (library, SCRIPT) if not path.is_file()]
    if missing:
        context.record("result", state=f"left out: there is no {' and no '.join(missing)}")
        return
    output = context.file(f"{context.part}.jsonl")
    seconds = f"{max(1.0, context.left() - 5):.0f}"
    command = [*before, sys.executable, str(SCRIPT), "--library", str(library), "--output", str(output)]
    command += ["--seconds", seconds]
    code = subprocess.run(command, cwd=ROOT, timeout=max(1.0, context.left() - 1)).returncode
    context.record("result", state="ok" if code == 0 else f"exit {code}")
    if code and not context.dry_run:
        raise SystemExit(f"{SCRIPT.name} ended with {code}; see the log")
