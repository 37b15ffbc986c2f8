"""Write engines to the engine store atomically. jinaclip.bundle.engines reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinaclip.bundle.engines import ENGINES, SIDECAR, engine_key
from jinaclip.bundle.files import file_sha256, new_directory
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError


def write_engine(bundle: Bundle, facts: Mapping[str, Any], fill: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Write `engines/<key>/` in the bundle or in its cache directory. An engine with the same key is replaced.

    Args:
        bundle: the bundle that the engine is for.
        facts: properties that the engine depends on, "tower" and "precision" among them; the key is a hash of them.
        fill: function that writes the engine's files into an empty directory and returns further sidecar fields.

    Returns:
        The content of the sidecar.

    Raises:
        BackendError: the engine cannot be written, or `fill` failed. Partial files are removed.
    """
    root = bundle.note_directory / ENGINES
    graph = bundle.graph(facts["tower"], facts["precision"]).name
    # The rewritten graph, the engine, and temporary files of the compiler.
    needed = 4 * sum(size for name, (size, _) in bundle.files.items() if name.startswith(graph))
    try:
        with new_directory(root / engine_key(facts), replace=True) as directory:
            free = shutil.disk_usage(root).free
            if free < needed:
                raise BackendError(f"{root} has {free / 1e9:.1f} GB free, the build needs {needed / 1e9:.1f} GB")
            sidecar = {**facts, **fill(directory), "made_by": f"jinaclip {version('jinaclip')}"}
            sidecar["files"] = {
                path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in sorted(directory.iterdir())
            }
            (directory / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise BackendError(
            f"cannot write {root}: {error.strerror or error}; use --cache DIR if the bundle is read-only"
        ) from error
    return sidecar
