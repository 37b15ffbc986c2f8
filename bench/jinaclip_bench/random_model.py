"""A random model to measure when there is no bundle: made once, kept in the user's cache.

Speed does not depend on the values of the weights, so random ones of the published shape stand in for the
published ones, which nobody has to download or accept a licence for.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import jinaclip.image
import jinaclip.text
import jinaclip_export
from jinaclip.bundle import Bundle
from jinaclip.errors import JinaClipError
from jinaclip_bench.errors import BenchError
from jinaclip_bench.torch_side import matching_checkpoint
from jinaclip_export.checkpoint import Checkpoint
from jinaclip_export.random_checkpoint import SIZES, published_config, write_random_checkpoint
from jinaclip_export.write import Identity, export_bundle

_DISK_GB = {"small": 0.05, "full": 5.2}
_COST = {"small": "some seconds", "full": "about 9 GB of memory, some minutes"}


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/jinaclip, by default ~/.cache/jinaclip."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "jinaclip"


def random_model(size: str, *, seed: int = 0, tell: Callable[[str], None]) -> tuple[Bundle, Checkpoint]:
    """The cached random model, made if it is not there, is damaged or is another exporter's.

    Args:
        size: "small" or "full".
        tell: called with a sentence before anything that takes long.

    Raises:
        BenchError: the disk is too small for it.
    """
    torch_version = version("torch").partition("+")[0]
    name = f"random-{size}-seed{seed}-jinaclip{version('jinaclip')}-torch{torch_version}"
    directory = cache_directory() / name
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f"{name}.lock"), tell):
        found = _open(directory)
        if found is None:
            _make(directory, size, seed, tell)
            found = _open(directory)
    if found is None:
        raise BenchError(f"{directory} was made and does not open; check the disk it is on")
    return found


def _open(directory: Path) -> tuple[Bundle, Checkpoint] | None:
    try:
        if (directory / "made-by").read_text("utf-8") != _exporter():
            return None
        bundle = Bundle(directory / "bundle")
        return bundle, matching_checkpoint(bundle, directory / "checkpoint")
    except (OSError, UnicodeError, JinaClipError):
        return None


def _make(directory: Path, size: str, seed: int, tell: Callable[[str], None]) -> None:
    """Made under another name and renamed, so that what has the name is whole; the caller holds the lock."""
    partial = directory.with_name(f"{directory.name}.partial")
    for stale in (directory, partial):  # a partial one is from a run that was killed
        if stale.exists():
            shutil.rmtree(stale)
    free = shutil.disk_usage(directory.parent).free / 1e9
    if free < _DISK_GB[size]:
        raise BenchError(
            f"{directory.parent} has {free:.1f} GB free, the random {size} model needs {_DISK_GB[size]} GB; "
            "free some space or set XDG_CACHE_HOME"
        )
    tell(f"making a random {size} model once: {_DISK_GB[size]} GB on disk in {directory}, {_COST[size]}")
    try:
        write_random_checkpoint(partial / "checkpoint", published_config(**SIZES[size]), seed=seed)
        identity = Identity(f"random-{size}", f"seed-{seed}", "none: random weights")
        export_bundle(Checkpoint(partial / "checkpoint"), partial / "bundle", identity=identity)
        (partial / "made-by").write_text(_exporter(), "utf-8")
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exporter() -> str:
    """Digest of the sources that decide a bundle: a graph that is no longer written must not be measured."""
    digest = hashlib.sha256()
    exporter = sorted(Path(jinaclip_export.__file__).parent.glob("*.py"))
    for path in (*exporter, Path(jinaclip.image.__file__), Path(jinaclip.text.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _locked(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting for another run that is making the random model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
