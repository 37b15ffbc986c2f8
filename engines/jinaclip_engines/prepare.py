"""Prepare a bundle's graph for ONNX Runtime on this machine's CPU: passes, its own optimisations, packed weights.

The result opens several times faster, and its weights are pages of a file that all processes share, in the layout
that this CPU's kernels read; so it is tied to the CPU's features and to onnxruntime's version (jinaclip.prepared).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinaclip.bundle import Bundle
from jinaclip.errors import BackendError
from jinaclip.prepared import ENGINES, SIDECAR, engine_key, find_prepared, required_facts
from jinaclip.sessions import import_onnxruntime, open_onnxruntime, session_options
from jinaclip_engines.cpu import TILED_ABOVE, for_cpu
from jinaclip_engines.graph import read, write


def prepare(bundle: Bundle, tower: str, precision: str, *, force: bool = False) -> tuple[str, bool]:
    """Write `engines/<key>/` for one graph, beside the bundle or in its cache directory.

    Args:
        force: make it again even if one fits already.

    Returns:
        The key, and whether it was made now.

    Raises:
        BackendError: it cannot be written; nothing is left of it.
    """
    found, _ = find_prepared(bundle, tower, precision)
    if found is not None and not force:
        return found.key, False
    facts = required_facts(bundle, tower, precision)
    key = engine_key(facts)
    root = next(bundle.note_directories()) / ENGINES
    partial = root / f".{key}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        free, needed = shutil.disk_usage(root).free, 4 * _size(bundle, tower, precision)
        if free < needed:
            raise BackendError(f"{root} has {free / 1e9:.1f} GB free, preparing needs up to {needed / 1e9:.1f} GB")
        passes = _write_graph(bundle, tower, precision, partial)
        sidecar = facts | {
            "passes": passes,
            "tiled_above": TILED_ABOVE if passes.get("tile_attention") and tower == "text" else None,
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
    return key, True


def _write_graph(bundle: Bundle, tower: str, precision: str, directory: Path) -> dict[str, int]:
    model = read(bundle.graph(tower, precision))
    passes = for_cpu(model, bundle.tower(tower).heads)
    rewritten = directory / "rewritten.onnx"
    write(model, rewritten)
    ort = import_onnxruntime()
    options = session_options(ort)
    options.optimized_model_filepath = str(directory / "graph.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "graph.onnx.data")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        open_onnxruntime(ort, rewritten, options, None)
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise BackendError(
            f"onnxruntime {ort.__version__} cannot prepare the {precision} {tower} graph: {error}"
        ) from error
    for path in (rewritten, rewritten.with_name(f"{rewritten.name}.data")):
        path.unlink()
    return passes


def _size(bundle: Bundle, tower: str, precision: str) -> int:
    prefix = bundle.graph(tower, precision).name
    return sum(size for name, (size, _) in bundle.files.items() if name.startswith(prefix))


def _file_facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
