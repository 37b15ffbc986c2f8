"""`jinaclip serve` in a separate process, while a case is measured."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.errors import BenchError
from jinaclip_bench.measuring.child_process import command
from jinaclip_bench.measuring.machine import cpu_seconds

START_S = 300  # enough to load a full-size graph that is not prepared from a slow disk


class Server:
    """A running server.

    Attributes:
        tower: tower that it serves.
        pid: id of its process.
        url: URL of its root.
    """

    def __init__(self, tower: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.tower, self.pid = tower, process.pid
        self._process, self._log = process, log
        self.url = self._started()

    def cpu_s(self) -> float | None:
        """CPU time that the server has used, in seconds; None if the system does not provide it."""
        return cpu_seconds(self.pid)

    def batches(self) -> dict[int, int]:
        """Number of the server's runs so far, by their number of items."""
        try:
            with urlopen(f"{self.url}/metrics", timeout=60) as answer:
                text = answer.read().decode("utf-8")
        except OSError as error:
            raise BenchError(
                f"`jinaclip serve` stopped responding ({error}); last line on stderr: {self.said()}"
            ) from error
        found = {}
        for labels, count in re.findall(r"^jinaclip_batches_total\{(.*)\} (\S+)$", text, re.MULTILINE):
            named = dict(re.findall(r'(\w+)="(.*?)"', labels))
            if named["tower"] == self.tower:
                found[int(named["size"])] = int(float(count))
        return found

    def said(self) -> str:
        """The last line that the server wrote to stderr."""
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "nothing"

    def _started(self) -> str:
        """Wait until the server is ready and return its URL."""
        deadline = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            found = re.search(r" at (http://\S+)/v1/embeddings", self._log.read_text("utf-8", "replace"))
            if found is not None:
                with suppress(OSError), urlopen(f"{found[1]}/ready", timeout=60):
                    return found[1]
            time.sleep(0.02)
        status = self._process.poll()
        how = f"within {START_S} s" if status is None else f"and ended with status {status}"
        raise BenchError(f"`jinaclip serve` did not become ready {how}; last line on stderr: {self.said()}")


@contextmanager
def serving(bundle: Bundle, tower: str, precision: str, *, threads: int) -> Iterator[Server]:
    """Run a server of one tower on the CPU. It is stopped at the end of the block, or when this process ends.

    Raises:
        BenchError: the server did not start. The message has its last line on stderr.
    """
    words = {
        "port": 0, "towers": tower, "precision": precision, "threads": threads, "device": "cpu",
        "backend": "onnxruntime",
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in words.items()]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JINACLIP_SERVE_")}
    with tempfile.NamedTemporaryFile(prefix="jinaclip-bench-") as log:
        started = command("jinaclip", "serve", str(bundle.directory), *options)
        process = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=log, env=clean)
        try:
            yield Server(tower, process, Path(log.name))
        finally:
            process.kill()
            process.wait()
