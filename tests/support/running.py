"""A server in a process of its own, for tests that talk to it over a real socket."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np


class Running:
    """A server in a process of its own.

    Args:
        module: whose command line has `serve`.

    Attributes:
        url: of its root.
    """

    def __init__(
        self, bundle: Path, *words: str, environment: dict[str, str] | None = None, module: str = "jinaclip"
    ) -> None:
        command = [sys.executable, "-m", module, "serve", str(bundle), "--port", "0", *words]
        self._stderr = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            command, stderr=self._stderr, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})}
        )
        try:
            self.url = self._started()
        except BaseException:
            self.end()
            raise

    def _started(self) -> str:
        """The server's address, once it answers."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"at (http://[^/\s]+)/", self.log)
            if found:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{found[1]}/ready").status_code == 200:
                        return found[1]
            time.sleep(0.05)
        raise AssertionError(f"the server does not answer: {self.log}")

    @property
    def log(self) -> str:
        """What it wrote to stderr so far."""
        return Path(self._stderr.name).read_text("utf-8")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._stderr.close()

    def post(self, body: Any, **settings: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/embeddings", json=body, timeout=300, **settings)

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} ([\d.e+]+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextmanager
def running(
    bundle: Path, *words: str, environment: dict[str, str] | None = None, module: str = "jinaclip"
) -> Iterator[Running]:
    server = Running(bundle, *words, environment=environment, module=module)
    try:
        yield server
    finally:
        server.end()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that comes, on the slowest machine too."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def vectors_of(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return np.array([entry["embedding"] for entry in data], np.float32)
