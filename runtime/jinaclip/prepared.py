"""Graphs prepared for ONNX Runtime by `jinaclip build`: found and opened, or left aside with the reason.

A prepared graph is the bundle's own graph, rewritten: for a CPU with its weights packed as this CPU's kernels read
them, for CUDA with the attention that its flash kernel takes. Where none fits, the bundle's graph is opened: the
vectors are the same.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinaclip.bundle import Bundle
from jinaclip.engine_store import SIDECAR_VERSION, damage, difference, engines_of
from jinaclip.gpu import Gpu
from jinaclip.onnxruntime_cuda import OnnxRuntimeCudaSession
from jinaclip.packing import CPU_COST, UNPADDED_CPU_COST
from jinaclip.sessions import OnnxRuntimeSession, Session, cpu_features, onnxruntime_version

GRAPH = "graph.onnx"
# How graphs are prepared for a CPU; one that was prepared otherwise is made again.
RECIPE = 2


@dataclass(frozen=True)
class Prepared:
    """A prepared graph that fits this machine.

    Attributes:
        key: its directory's name.
        path: the .onnx file.
        tiled_above: attention without padding runs in tiles from this many tokens on; None: never.
        unpadded: padding is computed by attention alone.
    """

    key: str
    path: Path
    tiled_above: int | None
    unpadded: bool


def open_graph(
    bundle: Bundle, tower: str, precision: str, *, gpu: Gpu | None = None, threads: int | None = None
) -> tuple[Session, str]:
    """A session of the prepared graph where one fits, else of the bundle's own; and, in words, which and why.

    Args:
        gpu: to run it on; None for the CPU.
        threads: cores for one run on the CPU.
    """
    device = "cpu" if gpu is None else "cuda"
    prepared, reason = find_prepared(bundle, tower, precision, device)
    path, key = (bundle.graph(tower, precision), None) if prepared is None else (prepared.path, prepared.key)
    if gpu is not None:
        pad = bundle.special_ids["pad"] if tower == "text" else 0
        return OnnxRuntimeCudaSession(path, gpu=gpu, prepared=key, pad=pad), reason
    if prepared is None:
        return OnnxRuntimeSession(path, threads=threads), reason
    cost = UNPADDED_CPU_COST if prepared.unpadded else CPU_COST
    tiled = prepared.tiled_above
    return OnnxRuntimeSession(path, threads=threads, prepared=key, tiled_above=tiled, cost=cost), reason


def find_prepared(bundle: Bundle, tower: str, precision: str, device: str = "cpu") -> tuple[Prepared | None, str]:
    """The prepared graph of a tower that fits this machine, or None; and the reason in words."""
    expected = required_facts(bundle, tower, precision, device)
    command = "jinaclip build" if device == "cpu" else "jinaclip build --device cuda"
    reasons = []
    for directory, sidecar in engines_of(bundle, tower, precision, "onnxruntime"):
        if sidecar.get("device", "cpu") != device:
            continue
        reason = _misfit(sidecar, expected) or damage(directory, sidecar, GRAPH)
        if reason is None:
            tiled = sidecar.get("tiled_above")
            found = Prepared(
                directory.name, directory / GRAPH,
                tiled_above=tiled if isinstance(tiled, int) else None, unpadded=sidecar.get("unpadded") is True,
            )  # fmt: skip
            return found, f"prepared graph {directory.name}"
        reasons.append(f"{directory.name} is not used: {reason}")
    if reasons:
        return None, f"the bundle's graph; {reasons[0]}; run `{command}` here"
    return None, f"the bundle's graph; `{command}` prepares one for this machine"


def running_graph(bundle: Bundle, tower: str, precision: str, device: str = "cpu") -> str:
    """Identity of the graph that would be opened here: the bundle's own, and what it was prepared as."""
    prepared, _ = find_prepared(bundle, tower, precision, device)
    identity = bundle.graph_identity(tower, precision)
    return identity if prepared is None else f"{identity} {prepared.key}"


def required_facts(bundle: Bundle, tower: str, precision: str, device: str = "cpu") -> dict[str, Any]:
    """What a prepared graph is tied to, as it is here and now. One for CUDA is only rewritten, and fits every GPU."""
    facts: dict[str, Any] = {
        "format_version": SIDECAR_VERSION,
        "backend": "onnxruntime",
        "tower": tower,
        "precision": precision,
        "graph": bundle.graph_identity(tower, precision),
    }
    if device != "cpu":
        return facts | {"device": device}
    return facts | {
        "recipe": RECIPE,
        "onnxruntime": onnxruntime_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_features": list(cpu_features()),
    }


def _misfit(sidecar: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    found, here = sidecar.get("cpu_features"), expected.get("cpu_features")
    others = {field: value for field, value in expected.items() if field != "cpu_features"}
    reason = difference(sidecar, others)
    if reason is None and found != here:
        if not isinstance(found, list) or not isinstance(here, list):
            return difference(sidecar, expected)
        more, less = sorted(set(found) - set(here)), sorted(set(here) - set(found))
        return f"it was made for a CPU with {more} and without {less}, unlike this one"
    return reason
