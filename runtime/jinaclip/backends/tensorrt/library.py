"""Loading of TensorRT and TensorRT-RTX, two packages with the same interface, and their log messages."""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from typing import Any

from jinaclip.backends.cuda.gpu import version_of
from jinaclip.errors import BackendMissing

# Module, first supported version and first unsupported version, by backend. The pip extra has the backend's name.
_PACKAGES = {"tensorrt": ("tensorrt", (10, 12), (12, 0)), "tensorrt-rtx": ("tensorrt_rtx", (1, 7), (2, 0))}


@dataclass(frozen=True)
class Library:
    """An imported package.

    Attributes:
        backend: "tensorrt" or "tensorrt-rtx".
        module: `tensorrt` or `tensorrt_rtx`.
        version: full version, such as "11.4.0.106". Engines are valid for one version only.
    """

    backend: str
    module: Any
    version: str

    @property
    def sums_attention_in_float32(self) -> bool:
        """Whether the operator `Attention` between casts is compiled to one kernel with float32 sums. This applies to
        TensorRT-RTX, and to TensorRT since 11.3 (see its release notes).
        """
        return self.backend == "tensorrt-rtx" or version_of(self.version) >= (11, 3)


def load_library(backend: str) -> Library:
    """Import the package of a backend.

    Raises:
        BackendMissing: it is not installed, cannot be loaded, or has an unsupported version.
    """
    name, first, end = _PACKAGES[backend]
    try:
        module = importlib.import_module(name)
    except Exception as error:  # includes errors of its loader about missing libraries
        raise BackendMissing(
            f"backend {backend!r} needs the package {name}, which cannot be loaded ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}); "
            f"run: pip install 'jinaclip[{backend}]'"
        ) from error
    version = str(module.__version__)
    if not first <= version_of(version) < end:
        raise BackendMissing(
            f"{name} {version} is installed, expected {'.'.join(map(str, first))} or newer, but older than {end[0]}; "
            f"run: pip install 'jinaclip[{backend}]'"
        )
    return Library(backend, module, version)


class Messages:
    """Collects the library's log messages during a `with` block.

    with Messages(library) as messages: …

    Attributes:
        lines: severity and text of each message.
    """

    def __init__(self, library: Library) -> None:
        self._logger = logger_of(library)
        self.lines: list[tuple[str, str]] = []

    def __enter__(self) -> Messages:
        self._logger.sinks[id(self)] = self.lines
        return self

    def __exit__(self, *_: object) -> None:
        del self._logger.sinks[id(self)]

    def errors(self) -> str:
        """The error messages, on one line."""
        found = [line for severity, line in self.lines if severity in ("ERROR", "INTERNAL_ERROR")]
        return "; ".join(line.strip().splitlines()[0] for line in found if line.strip())[:600]


def logger_of(library: Library) -> Any:
    """The ILogger for the library. There is one per process, because the library uses the first one permanently."""
    with _creating:  # several threads can open models at the same time
        if library.backend not in _loggers:
            _loggers[library.backend] = _new_logger(library.module)
        return _loggers[library.backend]


_loggers: dict[str, Any] = {}  # by backend
_creating = threading.Lock()


def _new_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.sinks: dict[int, list[tuple[str, str]]] = {}

        def log(self, severity: Any, message: str) -> None:
            for sink in list(self.sinks.values()):
                sink.append((severity.name, message))

    return Logger()
