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
from jinaclip_bench.measuring.subprocesses import last_line

START_S = 300  # enough to load a full-size graph that is not prepared from a slow disk


class ServerProcess:
    """A running server.

    Attributes:
        tower: tower that it serves.
        pid: id of its process.
        url: URL of its root.
    """

    def __init__(self, tower: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.tower, self.pid = tower, process.pid
        self._process, self._log = process, log
        self.url = self._wait_until_ready()

    def cpu_s(self) -> float | None:
        """CPU time that the server has used, in seconds; None if the system does not provide it."""
        return cpu_seconds(self.pid)

    def batches(self) -> dict[int, int]:
        """Number of the server's runs so far, by their number of items."""
        try:
            with urlopen(f"{self.url}/metrics", timeout=60) as answer:
                text = answer.read().decode("utf-8")
        except OSError as error:
            line = self.last_line()
            raise BenchError(f"`jinaclip serve` stopped responding ({error}); last line on stderr: {line}") from error
        counts = {}
        for label_text, count in re.findall(r"^jinaclip_batches_total\{(.*)\} (\S+)$", text, re.MULTILINE):
            labels = dict(re.findall(r'(\w+)="(.*?)"', label_text))
            if labels["tower"] == self.tower:
                counts[int(labels["size"])] = int(float(count))
        return counts

    def last_line(self) -> str:
        """The last line that the server wrote to stderr."""
        return last_line(self._log.read_bytes())

    def _wait_until_ready(self) -> str:
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
        raise BenchError(f"`jinaclip serve` did not become ready {how}; last line on stderr: {self.last_line()}")


@contextmanager
def serving(bundle: Bundle, tower: str, precision: str, *, threads: int) -> Iterator[ServerProcess]:
    """Run a server of one tower on the CPU. It is stopped at the end of the block, or when this process ends.

    Raises:
        BenchError: the server did not start. The message has its last line on stderr.
    """
    options = (
        f"--port=0 --towers={tower} --precision={precision} --threads={threads} --device=cpu --backend=onnxruntime"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JINACLIP_SERVE_")}
    with tempfile.NamedTemporaryFile(prefix="jinaclip-bench-") as log:
        serve = command("jinaclip", "serve", str(bundle.directory), *options.split())
        process = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=log, env=environment)
        try:
            yield ServerProcess(tower, process, Path(log.name))
        finally:
            process.kill()
            process.wait()
