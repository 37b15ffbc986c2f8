"""Writing into the engine store: an engine is whole, or it is not there (jinaclip.bundle.engines reads it)."""

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
    """Write `engines/<key>/`, beside the bundle or in its cache directory, in place of one with the same key.

    Args:
        facts: what the engine is tied to; they make its key.
        needed_bytes: of disk, at most, while it is made.
        fill: writes its files into an empty directory, and returns what else the sidecar says of them.

    Returns:
        The key.

    Raises:
        BackendError: it cannot be written, or `fill` refuses; nothing is left of it.
    """
    key = engine_key(facts)
    root = next(bundle.note_directories()) / ENGINES
    partial = root / f".{key}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(root).free
        if free < needed_bytes:
            raise BackendError(f"{root} has {free / 1e9:.1f} GB free, building needs up to {needed_bytes / 1e9:.1f} GB")
        sidecar = {
            **facts,
            **fill(partial),
            "made_by": f"jinaclip {version('jinaclip')}",
            "files": {path.name: _file_facts(path) for path in sorted(partial.iterdir())},
        }
        (partial / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", "utf-8")
        if (root / key).exists():
            os.rename(root / key, partial / "replaced")  # a reader that has it open keeps its files
        os.rename(partial, root / key)
        shutil.rmtree(root / key / "replaced", ignore_errors=True)
    except OSError as error:
        raise BackendError(
            f"cannot write {root}: {error.strerror or error}; a read-only bundle needs --cache DIR"
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
