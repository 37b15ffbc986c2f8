"""Graphs prepared for this machine's CPU by `jinaclip build`: found and opened, or left aside with the reason.

A prepared graph is the bundle's own graph, rewritten for ONNX Runtime, with its weights packed as this CPU's kernels
read them. Where none fits, the bundle's graph is opened: the vectors are the same.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinaclip.bundle import Bundle
from jinaclip.engine_store import SIDECAR_VERSION, damage, difference, engines_of
from jinaclip.sessions import OnnxRuntimeSession, cpu_features, onnxruntime_version

GRAPH = "graph.onnx"


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
    for directory, sidecar in engines_of(bundle, tower, precision, "onnxruntime"):
        reason = _misfit(sidecar, expected) or damage(directory, sidecar, GRAPH)
        if reason is None:
            tiled = sidecar.get("tiled_above")
            found = Prepared(directory.name, directory / GRAPH, tiled if isinstance(tiled, int) else None)
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


def _misfit(sidecar: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    found, here = sidecar.get("cpu_features"), expected["cpu_features"]
    others = {field: value for field, value in expected.items() if field != "cpu_features"}
    reason = difference(sidecar, others)
    if reason is None and found != here:
        if not isinstance(found, list):
            return difference(sidecar, expected)
        more, less = sorted(set(found) - set(here)), sorted(set(here) - set(found))
        return f"it was made for a CPU with {more} and without {less}, unlike this one"
    return reason
