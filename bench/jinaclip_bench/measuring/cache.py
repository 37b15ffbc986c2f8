"""Cache of generated models. An entry is valid until the code that generates it changes."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from filelock import FileLock, Timeout

import jinaclip.preprocessing
import jinaclip_engines
import jinaclip_export
from jinaclip.errors import JinaClipError
from jinaclip_bench.errors import BenchError

logger = logging.getLogger("jinaclip")
T = TypeVar("T")


@dataclass(frozen=True)
class CacheEntry(Generic[T]):
    """A directory of the cache. It is generated if it is missing, damaged or out of date.

    Attributes:
        name: name of the directory.
        description: description for messages, for example "random full model".
        disk_gb: size on disk, in GB.
        cost: cost of generating it, for messages.
        digest: digest of everything that determines the content. The entry is generated again when it changes.
        generate: function that writes the entry into a directory that does not exist yet.
        read: function that reads a directory. A JinaClipError or OSError means that the entry is damaged.
    """

    name: str
    description: str
    disk_gb: float
    cost: str
    digest: str
    generate: Callable[[Path], None]
    read: Callable[[Path], T]

    def get(self) -> T:
        """Return the entry, which is generated if necessary. A message is logged before a slow step.

        Raises:
            BenchError: there is not enough free disk space.
        """
        directory = cache_directory() / self.name
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory.with_name(f"{self.name}.lock"))  # released by the system if this process is killed
        try:
            acquired = lock.acquire(blocking=False)
        except Timeout:
            logger.warning("waiting for another run that is creating the %s", self.description)
            acquired = lock.acquire()
        with acquired:
            content = self.read_valid(directory)
            if content is None:
                self._generate(directory)
                content = self.read_valid(directory)
        if content is None:
            raise BenchError(f"{directory} was written but cannot be read; check its disk")
        return content

    def read_valid(self, directory: Path) -> T | None:
        """Read the entry in `directory`; None if it is missing, damaged or out of date."""
        try:
            if (directory / "made-by").read_text("utf-8") != self.digest:
                return None
            return self.read(directory)
        except (OSError, UnicodeError, JinaClipError):
            return None

    def _generate(self, directory: Path) -> None:
        """Generate the entry in a temporary directory and rename it when complete. The caller holds the lock."""
        partial = directory.with_name(f"{directory.name}.partial")
        for stale in (directory, partial):  # a partial directory is left over from a run that was killed
            if stale.exists():
                shutil.rmtree(stale)
        free = shutil.disk_usage(directory.parent).free / 1e9
        if free < self.disk_gb:
            raise BenchError(
                f"{directory.parent} has {free:.1f} GB free, the {self.description} needs {self.disk_gb:.2g} GB; "
                "free disk space or set XDG_CACHE_HOME"
            )
        size = f"{self.disk_gb:.2g} GB on disk in {directory}"
        logger.warning("creating a %s in the cache: %s, %s", self.description, size, self.cost)
        try:
            self.generate(partial)
            (partial / "made-by").write_text(self.digest, "utf-8")
            os.rename(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def cache_directory() -> Path:
    """Directory of the cache: $XDG_CACHE_HOME/jinaclip, by default ~/.cache/jinaclip."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "jinaclip"


def sources_digest(*more: Path) -> str:
    """Digest of the sources that determine an exported graph, and of the files `more`. It detects outdated graphs."""
    packages = (jinaclip.preprocessing, jinaclip_engines, jinaclip_export)
    sources = [path for package in packages for path in sorted(Path(package.__path__[0]).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in (*sources, *more):
        digest.update(path.read_bytes())
    return digest.hexdigest()
