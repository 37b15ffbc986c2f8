"""Files of a bundle and its cache directory: atomic writing, lenient reading, hashes, safe names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: it is never visible in part. An existing file is replaced."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object. None if the file is missing, damaged or has another value."""
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text("utf-8"))
        if isinstance(value, dict):
            return value
    return None


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a directory atomically: the block fills a temporary directory `.<name>.partial-<process id>` beside `path`.
    It is renamed to `path` when the block ends, and removed if the block raises an error.

    Args:
        path: the directory to write.
        replace: replace an existing directory. Otherwise `path` may exist only as an empty directory.

    Raises:
        OSError: the directory cannot be written, or `path` has content and `replace` is False.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            if replace:
                os.rename(path, partial / "replaced")  # processes that have it open can still read its files
            else:
                path.rmdir()
        os.rename(partial, path)
        shutil.rmtree(path / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def facts_hash(facts: Any) -> str:
    """A hash of JSON-compatible values, 16 hex digits. The order of an object's keys does not change it."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def safe_name(text: str) -> str:
    """`text` as a file name of letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"
