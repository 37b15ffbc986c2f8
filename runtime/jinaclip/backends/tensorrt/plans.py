"""Finding a bundle's TensorRT plans in the engine store, and checking that they are valid for this machine.

A plan is valid for one version of one library and for one GPU model. Plans of TensorRT-RTX are valid for the GPU
generations that they were compiled for. If no plan is valid, the error message has the command that builds one; there
is no fallback, and opening a model never builds a plan.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.shapes import Profile
from jinaclip.backends.tensorrt.engine import Plan
from jinaclip.backends.tensorrt.library import Library
from jinaclip.bundle.engines import damage, difference, engine_facts, engines_of
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendMissing, EngineMismatch

PLAN = "plan.engine"
PRECISION = "fp16"  # precision of all plans


def required_facts(bundle: Bundle, tower: str, library: Library) -> dict[str, Any]:
    """The facts that a plan's sidecar must have to be used, apart from the GPU (see `gpu_difference`)."""
    return engine_facts(bundle, tower, PRECISION, library.backend) | {"version": library.version}


def find_plan(bundle: Bundle, tower: str, library: Library, gpu: Gpu, *, hashes: bool = True) -> Plan:
    """Find the plan of a tower for this library and GPU. If there are several, the one that was built last is used.

    Args:
        bundle: the bundle.
        tower: name of the tower.
        library: the library that will run the plan.
        gpu: the GPU.
        hashes: also read the plan and compare its sha256. This is required before the plan is used.

    Raises:
        BackendMissing: the bundle has no plan for this backend; the message says how to build one.
        EngineMismatch: the bundle has plans, but none is valid; the message says what differs and how to build one.
    """
    expected = required_facts(bundle, tower, library)
    fitting: list[tuple[Path, dict[str, Any]]] = []
    misfits: list[tuple[str, dict[str, Any]]] = []  # with their sidecars
    for directory, sidecar in engines_of(bundle, tower, PRECISION, library.backend):
        reason = difference(sidecar, expected) or gpu_difference(sidecar, gpu)
        reason = reason or damage(directory, sidecar, PLAN) or _profiles_problem(sidecar)
        if reason is None:
            fitting.append((directory, sidecar))
        else:
            misfits.append((f"{directory.name} cannot be used: {reason}", sidecar))
    for directory, sidecar in sorted(fitting, key=lambda entry: str(entry[1].get("created")), reverse=True):
        reason = damage(directory, sidecar, PLAN, hashes=hashes)
        if reason is None:
            return Plan(directory.name, directory / PLAN, _profiles(sidecar))
        misfits.append((f"{directory.name} is damaged: {reason}", sidecar))
    if misfits:
        problem, sidecar = misfits[0]
        raise EngineMismatch(f"{problem}; build it again on this machine: {_command(bundle, sidecar)}")
    wanted = {"backend": library.backend, "tower": tower}
    raise BackendMissing(
        f"{bundle.directory} has no {library.backend} engine for its {tower} tower; build one on this machine: "
        f"{_command(bundle, wanted)}"
    )


def gpu_difference(sidecar: Mapping[str, Any], gpu: Gpu) -> str | None:
    """Why a plan is not valid for this GPU, as a message; None if it is valid."""
    targets = sidecar.get("targets")
    if isinstance(targets, list):
        if gpu.sm in targets:
            return None
        return f"it was compiled for {', '.join(map(str, targets))}, this GPU is {gpu} ({gpu.sm})"
    return difference({"gpu": sidecar.get("gpu")}, {"gpu": gpu.facts()})


def _profiles(sidecar: Mapping[str, Any]) -> tuple[Profile, ...]:
    return tuple(Profile.from_json(entry) for entry in sidecar["profiles"])


def _profiles_problem(sidecar: Mapping[str, Any]) -> str | None:
    try:
        return None if _profiles(sidecar) else "its sidecar lists no profile"
    except (KeyError, TypeError, ValueError) as error:
        return f"its profiles cannot be read ({error})"


def _command(bundle: Bundle, sidecar: Mapping[str, Any]) -> str:
    words = ["jinaclip", "build", str(bundle.directory), "--backend", str(sidecar.get("backend"))]
    for option, field in (("--towers", "tower"), ("--policy", "policy"), ("--profile", "profile_set")):
        if isinstance(sidecar.get(field), str):
            words += [option, sidecar[field]]
    return shlex.join(words)
