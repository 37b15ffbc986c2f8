"""What a benchmark makes for itself, once: kept in the user's cache until its maker changes."""

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
    """Something that is made into a directory of the cache.

    Attributes:
        name: of the directory.
        what: for messages, "random full model".
        gb: it takes on disk.
        cost: of making it, for messages.
        maker: digest of what decides its content; made by another, it is made again.
        make: writes it into a directory that does not exist yet.
        open: what a whole directory holds; a JinaClipError or OSError means that it is damaged.
    """

    name: str
    what: str
    gb: float
    cost: str
    maker: str
    make: Callable[[Path], None]
    open: Callable[[Path], T]

    def get(self, tell: Callable[[str], None]) -> T:
        """It, made if it is not there, is damaged or is another maker's.

        Args:
            tell: called with a sentence before anything that takes long.

        Raises:
            BenchError: the disk is too small for it.
        """
        directory = cache_directory() / self.name
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f"{self.name}.lock"), self.what, tell):
            found = self.found(directory)
            if found is None:
                self._make(directory, tell)
                found = self.found(directory)
        if found is None:
            raise BenchError(f"{directory} was made and does not open; check the disk it is on")
        return found

    def found(self, directory: Path) -> T | None:
        """What is there, if it is whole and of this maker."""
        try:
            if (directory / "made-by").read_text("utf-8") != self.maker:
                return None
            return self.open(directory)
        except (OSError, UnicodeError, JinaClipError):
            return None

    def _make(self, directory: Path, tell: Callable[[str], None]) -> None:
        """Made under another name and renamed, so that what has the name is whole; the caller holds the lock."""
        partial = directory.with_name(f"{directory.name}.partial")
        for stale in (directory, partial):  # a partial one is from a run that was killed
            if stale.exists():
                shutil.rmtree(stale)
        free = shutil.disk_usage(directory.parent).free / 1e9
        if free < self.gb:
            raise BenchError(
                f"{directory.parent} has {free:.1f} GB free, the {self.what} needs {self.gb:.2g} GB; "
                "free some space or set XDG_CACHE_HOME"
            )
        tell(f"making a {self.what} once: {self.gb:.2g} GB on disk in {directory}, {self.cost}")
        try:
            self.make(partial)
            (partial / "made-by").write_text(self.maker, "utf-8")
            os.rename(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/jinaclip, by default ~/.cache/jinaclip."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "jinaclip"


def exporter(*more: Path) -> str:
    """Digest of the sources that decide a graph, and of `more`: one that is no longer written must not be measured."""
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
    """One process at a time; the system frees the lock of one that dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting for another run that is making the {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
