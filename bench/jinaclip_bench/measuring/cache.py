"""Cache of generated models. An entry is valid until the code that generates it changes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jinaclip.preprocessing.image
import jinaclip.preprocessing.image_sources
import jinaclip.preprocessing.text
import jinaclip_engines
import jinaclip_export
from jinaclip.errors import JinaClipError
from jinaclip_bench.errors import BenchError

T = TypeVar("T")


@dataclass(frozen=True)
class Cached(Generic[T]):
    """An entry of the cache, generated into a directory.

    Attributes:
        name: name of the directory.
        what: description for messages, for example "random full model".
        gb: size on disk, in GB.
        cost: cost of generating it, for messages.
        maker: digest of everything that determines the content. The entry is generated again when it changes.
        make: function that writes the entry into a directory that does not exist yet.
        open: function that reads a directory. A JinaClipError or OSError means that the entry is damaged.
    """

    name: str
    what: str
    gb: float
    cost: str
    maker: str
    make: Callable[[Path], None]
    open: Callable[[Path], T]

    def get(self, tell: Callable[[str], None]) -> T:
        """Return the entry. It is generated if it is missing, damaged or out of date.

        Args:
            tell: function that receives a message before a slow step.

        Raises:
            BenchError: there is not enough free disk space.
        """
        directory = cache_directory() / self.name
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f"{self.name}.lock"), self.what, tell):
            found = self.found(directory)
            if found is None:
                self._make(directory, tell)
                found = self.found(directory)
        if found is None:
            raise BenchError(f"{directory} was written but cannot be read; check its disk")
        return found

    def found(self, directory: Path) -> T | None:
        """The existing entry, if it is complete and up to date; otherwise None."""
        try:
            if (directory / "made-by").read_text("utf-8") != self.maker:
                return None
            return self.open(directory)
        except (OSError, UnicodeError, JinaClipError):
            return None

    def _make(self, directory: Path, tell: Callable[[str], None]) -> None:
        """Generate the entry in a temporary directory and rename it when complete. The caller holds the lock."""
        partial = directory.with_name(f"{directory.name}.partial")
        for stale in (directory, partial):  # a partial directory is left over from a run that was killed
            if stale.exists():
                shutil.rmtree(stale)
        free = shutil.disk_usage(directory.parent).free / 1e9
        if free < self.gb:
            raise BenchError(
                f"{directory.parent} has {free:.1f} GB free, the {self.what} needs {self.gb:.2g} GB; "
                "free disk space or set XDG_CACHE_HOME"
            )
        tell(f"creating a {self.what} in the cache: {self.gb:.2g} GB on disk in {directory}, {self.cost}")
        try:
            self.make(partial)
            (partial / "made-by").write_text(self.maker, "utf-8")
            os.rename(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def cache_directory() -> Path:
    """Directory of the cache: $XDG_CACHE_HOME/jinaclip, by default ~/.cache/jinaclip."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "jinaclip"


def exporter(*more: Path) -> str:
    """Digest of the sources that determine an exported graph, and of the files `more`. It detects outdated graphs."""
    digest = hashlib.sha256()
    packages: tuple[Any, ...] = (jinaclip_engines, jinaclip_export)
    folders = [Path(package.__file__).parent for package in packages]
    sources = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    preprocessing = (jinaclip.preprocessing.image, jinaclip.preprocessing.image_sources, jinaclip.preprocessing.text)
    for path in (*sources, *(Path(str(module.__file__)) for module in preprocessing), *more):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _locked(path: Path, what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Lock the entry for this process. The system releases the lock when the process ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting for another run that is creating the {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
