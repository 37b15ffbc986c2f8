"""Run a command that measures something, and read the JSON object that it prints."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from jinaclip_bench.errors import BenchError


def run_json(command: Sequence[str], name: str, *, stdin: bytes = b"") -> dict[str, Any]:
    """Run a command and parse what it prints.

    Args:
        command: the command.
        name: name of the process, for the error message.
        stdin: input of the command.

    Raises:
        BenchError: the command failed. The message has its last line on stderr.
    """
    done = subprocess.run(command, input=stdin, capture_output=True)
    if done.returncode != 0:
        hint = "; was there enough memory?" if done.returncode < 0 else ""
        raise BenchError(f"{name} failed with status {done.returncode}: {last_line(done.stderr)}{hint}")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def last_line(output: bytes) -> str:
    """The last line of a process's output, or "nothing"."""
    return (output.decode("utf-8", "replace").strip().splitlines() or ["nothing"])[-1]
