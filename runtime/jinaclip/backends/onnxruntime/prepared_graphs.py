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

from jinaclip.backends.base import Session
from jinaclip.backends.cost import CPU_COST, UNPADDED_CPU_COST
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.machine import cpu_features
from jinaclip.backends.onnxruntime.cpu import OnnxRuntimeSession
from jinaclip.backends.onnxruntime.cuda import OnnxRuntimeCudaSession
from jinaclip.backends.onnxruntime.cuda_operators import VERSION as OPERATORS_VERSION
from jinaclip.backends.onnxruntime.cuda_operators import operators_for
from jinaclip.backends.onnxruntime.library import onnxruntime_version
from jinaclip.bundle.engines import SIDECAR_VERSION, damage, difference, engines_of
from jinaclip.bundle.manifest import Bundle

GRAPH = "graph.onnx"
# How graphs are prepared, by device; one that was prepared otherwise is made again.
RECIPE = {"cpu": 2, "cuda": 2}


@dataclass(frozen=True)
class Prepared:
    """A prepared graph that fits this machine.

    Attributes:
        key: its directory's name.
        path: the .onnx file.
        tiled_above: attention without padding runs in tiles from this many tokens on; None: never.
        unpadded: padding is computed by attention alone.
        operators: it has jinaclip's own CUDA operators.
    """

    key: str
    path: Path
    tiled_above: int | None
    unpadded: bool
    operators: bool = False


def open_graph(
    bundle: Bundle, tower: str, precision: str, *, gpu: Gpu | None = None, threads: int | None = None
) -> tuple[Session, str]:
    """A session of the prepared graph where one fits, else of the bundle's own; and, in words, which and why.

    Args:
        gpu: to run it on; None for the CPU.
        threads: cores for one run on the CPU.
    """
    library = operators_for(gpu)
    device = "cpu" if gpu is None else "cuda"
    prepared, reason = find_prepared(bundle, tower, precision, device, operators=library is not None)
    path, key = (bundle.graph(tower, precision), None) if prepared is None else (prepared.path, prepared.key)
    if gpu is not None:
        pad = bundle.special_ids["pad"] if tower == "text" else 0
        operators = library if prepared is not None and prepared.operators else None
        return OnnxRuntimeCudaSession(path, gpu=gpu, prepared=key, pad=pad, operators=operators), reason
    if prepared is None:
        return OnnxRuntimeSession(path, threads=threads), reason
    cost = UNPADDED_CPU_COST if prepared.unpadded else CPU_COST
    tiled = prepared.tiled_above
    return OnnxRuntimeSession(path, threads=threads, prepared=key, tiled_above=tiled, cost=cost), reason


def find_prepared(
    bundle: Bundle, tower: str, precision: str, device: str = "cpu", *, operators: bool = False
) -> tuple[Prepared | None, str]:
    """The prepared graph of a tower that fits this machine, or None; and the reason in words.

    Args:
        operators: jinaclip's own CUDA operators can be used. A graph that has them is then taken before one without.
    """
    command = "jinaclip build" if device == "cpu" else "jinaclip build --device cuda"
    reasons = []
    for wanted in (True, False):
        expected = required_facts(bundle, tower, precision, device, operators=wanted)
        for directory, sidecar in engines_of(bundle, tower, precision, "onnxruntime"):
            if sidecar.get("device", "cpu") != device or (sidecar.get("operators") is not None) != wanted:
                continue
            missing = "jinaclip's CUDA operators are not here" if wanted and not operators else None
            reason = missing or _misfit(sidecar, expected) or damage(directory, sidecar, GRAPH)
            if reason is None:
                tiled = sidecar.get("tiled_above")
                found = Prepared(
                    directory.name, directory / GRAPH, tiled_above=tiled if isinstance(tiled, int) else None,
                    unpadded=sidecar.get("unpadded") is True, operators=wanted,
                )  # fmt: skip
                return found, f"prepared graph {directory.name}"
            reasons.append(f"{directory.name} is not used: {reason}")
    if reasons:
        return None, f"the bundle's graph; {reasons[0]}; run `{command}` here"
    return None, f"the bundle's graph; `{command}` prepares one for this machine"


def running_graph(bundle: Bundle, tower: str, precision: str, gpu: Gpu | None = None) -> str:
    """Identity of the graph that would be opened here: the bundle's own, and what it was prepared as."""
    device, operators = "cpu" if gpu is None else "cuda", operators_for(gpu) is not None
    prepared, _ = find_prepared(bundle, tower, precision, device, operators=operators)
    identity = bundle.graph_identity(tower, precision)
    return identity if prepared is None else f"{identity} {prepared.key}"


def required_facts(
    bundle: Bundle, tower: str, precision: str, device: str = "cpu", *, operators: bool = False
) -> dict[str, Any]:
    """What a prepared graph is tied to, as it is here and now. One for CUDA is only rewritten, and fits every GPU that
    its operators run on.
    """
    facts: dict[str, Any] = {
        "format_version": SIDECAR_VERSION,
        "backend": "onnxruntime",
        "recipe": RECIPE[device],
        "tower": tower,
        "precision": precision,
        "graph": bundle.graph_identity(tower, precision),
    }
    if device != "cpu":
        return facts | {"device": device} | ({"operators": OPERATORS_VERSION} if operators else {})
    return facts | {
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
