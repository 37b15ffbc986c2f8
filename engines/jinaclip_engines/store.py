"""Write engines to the engine store atomically. jinaclip.bundle.engines reads them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinaclip.bundle.engines import ENGINES, SIDECAR, engine_key
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError


def write_engine(
    bundle: Bundle, facts: Mapping[str, Any], needed_bytes: int, fill: Callable[[Path], Mapping[str, Any]]
) -> str:
    """Write `engines/<key>/` in the bundle or in its cache directory. An engine with the same key is replaced.

    Args:
        bundle: the bundle that the engine is for.
        facts: properties that the engine depends on; the key is a hash of them.
        needed_bytes: the largest disk space needed during the build, in bytes.
        fill: function that writes the engine's files into an empty directory and returns further sidecar fields.

    Returns:
        The key.

    Raises:
        BackendError: the engine cannot be written, or `fill` failed. Partial files are removed.
    """
    key = engine_key(facts)
    root = bundle.note_directory / ENGINES
    partial = root / f".{key}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(root).free
        if free < needed_bytes:
            raise BackendError(f"{root} has {free / 1e9:.1f} GB free, the build needs {needed_bytes / 1e9:.1f} GB")
        sidecar = {
            **facts,
            **fill(partial),
            "made_by": f"jinaclip {version('jinaclip')}",
            "files": {path.name: _file_facts(path) for path in sorted(partial.iterdir())},
        }
        (partial / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", "utf-8")
        if (root / key).exists():
            os.rename(root / key, partial / "replaced")  # processes that have it open can still read its files
        os.rename(partial, root / key)
        shutil.rmtree(root / key / "replaced", ignore_errors=True)
    except OSError as error:
        raise BackendError(
            f"cannot write {root}: {error.strerror or error}; use --cache DIR if the bundle is read-only"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return key


def graph_bytes(bundle: Bundle, tower: str, precision: str) -> int:
    """Size of a graph of the bundle, weights included."""
    prefix = bundle.graph(tower, precision).name
    return sum(size for name, (size, _) in bundle.files.items() if name.startswith(prefix))


def _file_facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
