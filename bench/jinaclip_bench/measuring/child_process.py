"""Run a module that ends when its parent does: `python -m …child_process PARENT MODULE …`, PARENT its process id.

A server that outlives a run that was killed would take the cores from all later ones.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2); kept over exec


def command(module: str, *words: str) -> list[str]:
    """What to start for a module that ends with this process; on Linux alone, elsewhere it goes on."""
    return [sys.executable, "-P", "-m", "jinaclip_bench.measuring.child_process", str(os.getpid()), module, *words]


def main() -> int:
    parent, *module = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it ended before that call
            return 1
    os.execv(sys.executable, [sys.executable, "-P", "-m", *module])


if __name__ == "__main__":
    sys.exit(main())
