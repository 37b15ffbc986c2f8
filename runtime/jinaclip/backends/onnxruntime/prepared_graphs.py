"""Prepared graphs, which `jinaclip build` makes for ONNX Runtime: finding the one for this machine.

A prepared graph is a rewritten copy of a bundle's graph. For CPUs its weights are packed in the layout that the CPU's
kernels read. For CUDA its attention is in the form that the flash attention kernel needs. Without a matching prepared
graph, the bundle's graph is opened; the vectors are the same.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinaclip.backends.cost import CPU_COST, UNPADDED_CPU_COST, RunCost
from jinaclip.backends.machine import cpu_features
from jinaclip.backends.onnxruntime.cuda_operators import VERSION as OPERATORS_VERSION
from jinaclip.backends.onnxruntime.library import import_onnxruntime
from jinaclip.bundle.engines import damage, difference, engine_facts, engines_of
from jinaclip.bundle.manifest import Bundle

GRAPH = "graph.onnx"
# Version of the preparation, by device. Graphs of another version are not used and are built again.
RECIPE = {"cpu": 2, "cuda": 2}


@dataclass(frozen=True)
class Prepared:
    """A prepared graph for this machine.

    Attributes:
        key: name of its directory.
        path: the .onnx file.
        cost: cost of a run on the CPU.
        operators: the graph uses jinaclip's own CUDA operators.
    """

    key: str
    path: Path
    cost: RunCost
    operators: bool = False


def find_prepared(
    bundle: Bundle, tower: str, precision: str, device: str = "cpu", *, operators: bool = False
) -> tuple[Prepared | None, str]:
    """Find the prepared graph of a tower for this machine.

    Args:
        bundle: the bundle.
        tower: name of the tower.
        precision: precision of the graph.
        device: "cpu" or "cuda".
        operators: whether jinaclip's own CUDA operators can be used. Graphs with them are then preferred.

    Returns:
        The prepared graph or None, and a message with the reason.
    """
    command = "jinaclip build" if device == "cpu" else "jinaclip build --device cuda"
    reasons = []
    for wanted in (True, False):
        expected = required_facts(bundle, tower, precision, device, operators=wanted)
        for directory, sidecar in engines_of(bundle, tower, precision, "onnxruntime"):
            if sidecar.get("device", "cpu") != device or (sidecar.get("operators") is not None) != wanted:
                continue
            missing = "jinaclip's CUDA operators are not available" if wanted and not operators else None
            reason = missing or _misfit(sidecar, expected) or damage(directory, sidecar, GRAPH)
            if reason is None:
                found = Prepared(directory.name, directory / GRAPH, _cost(sidecar), operators=wanted)
                return found, f"prepared graph {directory.name}"
            reasons.append(f"{directory.name} is not used: {reason}")
    if reasons:
        return None, f"the bundle's graph; {reasons[0]}; run `{command}` on this machine"
    return None, f"the bundle's graph; `{command}` prepares one for this machine"


def required_facts(
    bundle: Bundle, tower: str, precision: str, device: str = "cpu", *, operators: bool = False
) -> dict[str, Any]:
    """The facts that a prepared graph's sidecar must have to be used on this machine. Graphs for CUDA do not depend on
    the machine, apart from the operators that they use.
    """
    facts = engine_facts(bundle, tower, precision, "onnxruntime") | {"recipe": RECIPE[device]}
    if device != "cpu":
        return facts | {"device": device} | ({"operators": OPERATORS_VERSION} if operators else {})
    return facts | {
        "onnxruntime": import_onnxruntime().__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_features": list(cpu_features()),
    }


def _cost(sidecar: Mapping[str, Any]) -> RunCost:
    tiled = sidecar.get("tiled_above")
    unpadded = sidecar.get("unpadded") is True  # only attention computes padding
    return replace(UNPADDED_CPU_COST if unpadded else CPU_COST, tiled_above=tiled if isinstance(tiled, int) else None)


def _misfit(sidecar: Mapping[str, Any], expected: dict[str, Any]) -> str | None:
    found, here = sidecar.get("cpu_features"), expected.get("cpu_features")
    others = difference(sidecar, expected | {"cpu_features": found})
    if others is None and found != here and isinstance(found, list) and isinstance(here, list):
        more, less = sorted(set(found) - set(here)), sorted(set(here) - set(found))
        return f"it was built for a CPU with {more} and without {less}, unlike this CPU"
    return others or difference(sidecar, expected)
