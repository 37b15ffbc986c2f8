"""Run a module in a process that ends with its parent: `python -m …child_process PARENT MODULE …`.

PARENT is the parent's process id. Without this, the server of a run that was killed would keep running and slow down
later runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # option of Linux's prctl(2); preserved by exec


def command(module: str, *words: str) -> list[str]:
    """Command that runs a module in a process that ends with this one. On systems other than Linux it does not end."""
    return [sys.executable, "-P", "-m", "jinaclip_bench.measuring.child_process", str(os.getpid()), module, *words]


def main() -> int:
    parent, *module = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # the parent ended before the call
            return 1
    os.execv(sys.executable, [sys.executable, "-P", "-m", *module])


if __name__ == "__main__":
    sys.exit(main())
