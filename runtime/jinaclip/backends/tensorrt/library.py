"""TensorRT and TensorRT-RTX: one interface, two packages. Loaded here, by the names that both have."""

from __future__ import annotations

import importlib
import re
import threading
from dataclasses import dataclass
from typing import Any

from jinaclip.errors import BackendMissing

BACKENDS = ("tensorrt", "tensorrt-rtx")
# Module, extra, first version that is served and first that is not.
_PACKAGES = {
    "tensorrt": ("tensorrt", "tensorrt", (10, 12), (12, 0)),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx", (1, 7), (2, 0)),
}


@dataclass(frozen=True)
class Library:
    """An imported package.

    Attributes:
        backend: of BACKENDS.
        module: `tensorrt` or `tensorrt_rtx`.
        version: in full, "11.4.0.106": engines are tied to it.
    """

    backend: str
    module: Any
    version: str

    @property
    def sums_attention_in_float32(self) -> bool:
        """Whether the operator `Attention` between casts is one kernel with float32 sums: TensorRT-RTX, and TensorRT
        from 11.3 on (its release notes).
        """
        return self.backend == "tensorrt-rtx" or version_of(self.version) >= (11, 3)


def load_library(backend: str) -> Library:
    """Import the package of a backend.

    Raises:
        BackendMissing: it is not installed, does not load, or is of another version than is served.
    """
    name, extra, first, end = _PACKAGES[backend]
    try:
        module = importlib.import_module(name)
    except Exception as error:  # also what its loader says of libraries that are not there
        raise BackendMissing(
            f"backend {backend!r} needs the package {name}, which does not load ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}); "
            f"run: pip install 'jinaclip[{extra}]'"
        ) from error
    version = str(module.__version__)
    if not first <= version_of(version) < end:
        raise BackendMissing(
            f"{name} {version} is installed, jinaclip works with {'.'.join(map(str, first))} and newer, before "
            f"{end[0]}; run: pip install 'jinaclip[{extra}]'"
        )
    return Library(backend, module, version)


def version_of(text: str) -> tuple[int, int]:
    """(11, 4) of "11.4.0.106"."""
    major, minor, *_ = [*(int(number) for number in re.findall(r"\d+", text)), 0, 0]
    return major, minor


class Messages:
    """What a library said while a block ran, by severity.

    with Messages(library) as messages: …
    """

    def __init__(self, library: Library) -> None:
        self._logger = _logger(library.backend)
        self.lines: list[tuple[str, str]] = []

    def __enter__(self) -> Messages:
        self._logger.sinks[id(self)] = self.lines
        return self

    def __exit__(self, *_: object) -> None:
        del self._logger.sinks[id(self)]

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(line for _, line in self.lines)

    def errors(self) -> str:
        """The errors, in one line."""
        found = [line for severity, line in self.lines if severity in ("ERROR", "INTERNAL_ERROR")]
        return "; ".join(line.strip().splitlines()[0] for line in found if line.strip())[:600]


def logger_of(library: Library) -> Any:
    """The library's ILogger: the first that a process gives it serves for good, so there is one."""
    return _logger(library.backend)


_loggers: dict[str, Any] = {}  # by backend
_making = threading.Lock()


def _logger(backend: str) -> Any:
    with _making:  # two threads may open models at the same time
        if backend not in _loggers:
            _loggers[backend] = _new_logger(load_library(backend).module)
        return _loggers[backend]


def _new_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.sinks: dict[int, list[tuple[str, str]]] = {}

        def log(self, severity: Any, message: str) -> None:
            for sink in list(self.sinks.values()):
                sink.append((severity.name, message))

    return Logger()
