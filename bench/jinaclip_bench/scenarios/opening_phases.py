"""Measure the time and memory of a new process by phase, from its start to its first text vector.

    python -m jinaclip_bench.scenarios.opening_phases BUNDLE [--precision int8]

It prints one line per phase: milliseconds, and the process's own memory after the phase in MiB. Pages of files, which
processes share, are not counted. `jinaclip bench run --cases process-text` measures the total, in turn with torch.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEXT = "A cup of coffee on a wooden table"


def own_mib() -> float:
    """Anonymous memory of the process, in MiB; NaN if the system does not provide it."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) / 1024
    except (OSError, StopIteration):
        return float("nan")


def interpreter_ms() -> float:
    """Milliseconds since the start of this process; NaN if the system does not provide it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text("utf-8").split()[0])
    except (OSError, IndexError, ValueError):
        return float("nan")
    return (uptime - ticks / os.sysconf("SC_CLK_TCK")) * 1e3


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Time a block and print its line."""
    start = time.perf_counter()
    yield
    milliseconds = (time.perf_counter() - start) * 1e3
    print(f"{name:<24} {milliseconds:7.1f} ms {own_mib():7.1f} MiB")


def main() -> None:
    print(f"{'interpreter':<24} {interpreter_ms():7.1f} ms {own_mib():7.1f} MiB")  # before argparse has run
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--precision", default="int8")
    args = parser.parse_args()
    with phase("import numpy, Pillow"):
        import PIL.Image  # noqa: F401
    with phase("import jinaclip"):
        from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu
        from jinaclip.backends.onnxruntime.library import import_onnxruntime
        from jinaclip.backends.self_test import run_self_test
        from jinaclip.bundle.manifest import Bundle
    with phase("import onnxruntime"):
        import_onnxruntime()
    with phase("open the bundle"):
        bundle = Bundle(args.bundle)
    # The parts of an encoder are opened one by one, to time each.
    with phase("read the tokenizer"):
        tokenizer = bundle.open_tokenizer()
    with phase("open the graph"):
        session, how = OnnxRuntimeCpu().open(bundle, "text", args.precision)
    with phase("self-test"):
        run_self_test(bundle, "text", args.precision, session, tokenizer=tokenizer)
    with phase("first text"):
        ids = tokenizer.padded(tokenizer.encode([TEXT]))
        session.run({bundle.tower("text").input_name: ids})
    print(how)


if __name__ == "__main__":
    main()
