"""Graphs prepared for this machine by `jinaclip build`: found and opened, or left aside with the reason.

A prepared graph is the bundle's own graph, rewritten for one backend, with its weights packed as this CPU's kernels
read them. It lies in `engines/<key>/` beside a sidecar, engine.json, that says what it is tied to. docs/bundle.md has
the format. Where none fits, the bundle's graph is opened: the vectors are the same.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinaclip.bundle import Bundle
from jinaclip.sessions import OnnxRuntimeSession, cpu_features, onnxruntime_version

ENGINES = "engines"
SIDECAR = "engine.json"
SIDECAR_VERSION = 1


@dataclass(frozen=True)
class Prepared:
    """A prepared graph that fits this machine.

    Attributes:
        key: its directory's name.
        path: the .onnx file.
        tiled_above: attention without padding runs in tiles from this many tokens on; None: never.
    """

    key: str
    path: Path
    tiled_above: int | None


def open_graph(
    bundle: Bundle, tower: str, precision: str, *, device: str = "cpu", threads: int | None = None
) -> tuple[OnnxRuntimeSession, str]:
    """A session of the prepared graph where one fits, else of the bundle's own; and, in words, which and why."""
    prepared, reason = find_prepared(bundle, tower, precision)
    if prepared is None:
        return OnnxRuntimeSession(bundle.graph(tower, precision), device=device, threads=threads), reason
    session = OnnxRuntimeSession(
        prepared.path, device=device, threads=threads, prepared=prepared.key, tiled_above=prepared.tiled_above
    )
    return session, reason


def find_prepared(bundle: Bundle, tower: str, precision: str) -> tuple[Prepared | None, str]:
    """The prepared graph of a tower that fits this machine, or None; and the reason in words."""
    expected = required_facts(bundle, tower, precision)
    reasons = []
    for directory in _candidates(bundle, f"{tower}-{precision}-onnxruntime-"):
        sidecar = _read_sidecar(directory)
        reason = _misfit(sidecar, expected) or _damage(directory, sidecar)
        if reason is None:
            tiled = sidecar.get("tiled_above")
            found = Prepared(directory.name, directory / "graph.onnx", tiled if isinstance(tiled, int) else None)
            return found, f"prepared graph {directory.name}"
        reasons.append(f"{directory.name} is not used: {reason}")
    if reasons:
        return None, f"the bundle's graph; {reasons[0]}; run `jinaclip build` here"
    return None, "the bundle's graph; `jinaclip build` prepares one for this machine"


def running_graph(bundle: Bundle, tower: str, precision: str) -> str:
    """Identity of the graph that would be opened here: the bundle's own, and what it was prepared as."""
    prepared, _ = find_prepared(bundle, tower, precision)
    identity = bundle.graph_identity(tower, precision)
    return identity if prepared is None else f"{identity} {prepared.key}"


def required_facts(bundle: Bundle, tower: str, precision: str) -> dict[str, Any]:
    """What a prepared graph is tied to, as it is here and now."""
    return {
        "format_version": SIDECAR_VERSION,
        "backend": "onnxruntime",
        "tower": tower,
        "precision": precision,
        "graph": bundle.graph_identity(tower, precision),
        "onnxruntime": onnxruntime_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_features": list(cpu_features()),
    }


def engine_key(facts: Mapping[str, Any]) -> str:
    """Name of the directory of a prepared graph: readable, and different whenever a fact is."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return f"{facts['tower']}-{facts['precision']}-{facts['backend']}-{digest}"


def _candidates(bundle: Bundle, prefix: str) -> Iterator[Path]:
    for root in bundle.note_directories():
        with suppress(OSError):
            yield from sorted(path for path in (root / ENGINES).iterdir() if path.name.startswith(prefix))


def _read_sidecar(directory: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        sidecar = json.loads((directory / SIDECAR).read_text("utf-8"))
        if isinstance(sidecar, dict):
            return sidecar
    return {}


def _misfit(sidecar: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    for field, value in expected.items():
        if sidecar.get(field) != value:
            found = sidecar.get(field)
            if isinstance(found, list) and isinstance(value, list):
                found, value = sorted(set(found) - set(value)), sorted(set(value) - set(found))
                return f"it was made for a CPU with {found} and without {value}, unlike this one"
            return f"its {field} is {found!r:.80}, here it is {value!r:.80}"
    return None


def _damage(directory: Path, sidecar: Mapping[str, Any]) -> str | None:
    files = sidecar.get("files")
    if not isinstance(files, dict) or "graph.onnx" not in files:
        return f"its {SIDECAR} lists no graph.onnx"
    for name, entry in files.items():
        path = directory / Path(str(name)).name
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if not path.is_file() or path.stat().st_size != size:
            return f"{path.name} is missing or not of the {size} bytes that were written"
    return None
