"""TensorRT plans of a bundle: found in the engine store and held to what is here, or refused with the way to rebuild.

A plan belongs to one version of one library and to one GPU model; TensorRT-RTX's to the GPU generations it was
compiled for. Nothing is built when a model is opened, and nothing is taken in place of what was asked.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.shapes import Profile
from jinaclip.backends.tensorrt.library import Library
from jinaclip.backends.tensorrt.session import TensorRTSession
from jinaclip.bundle.engines import SIDECAR_VERSION, damage, difference, engines_of
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendMissing, EngineMismatch

PLAN = "plan.engine"
PRECISION = "fp16"  # of every plan


@dataclass(frozen=True)
class Plan:
    """A plan that fits.

    Attributes:
        key: of the engine.
        path: the file.
        profiles: in the plan's order.
    """

    key: str
    path: Path
    profiles: tuple[Profile, ...]


def required_facts(bundle: Bundle, tower: str, library: Library) -> dict[str, Any]:
    """What a plan is tied to, as it is here and now, but for the GPU (`fits_gpu`)."""
    return {
        "format_version": SIDECAR_VERSION,
        "backend": library.backend,
        "tower": tower,
        "precision": PRECISION,
        "graph": bundle.graph_identity(tower, PRECISION),
        "version": library.version,
    }


def find_plan(bundle: Bundle, tower: str, library: Library, gpu: Gpu, *, hashes: bool = True) -> Plan:
    """The plan of a tower that fits this library and GPU; of several the one that was built last.

    Args:
        hashes: read the plan and compare its sha256, as must be done before it is used.

    Raises:
        BackendMissing: the bundle has no plan for this backend; says how to build one.
        EngineMismatch: it has some, and none fits; says which field differs, and how to build it again.
    """
    expected = required_facts(bundle, tower, library)
    fitting: list[tuple[Path, dict[str, Any]]] = []
    misfits = []
    for directory, sidecar in engines_of(bundle, tower, PRECISION, library.backend):
        reason = (
            difference(sidecar, expected)
            or gpu_difference(sidecar, gpu)
            or damage(directory, sidecar, PLAN)
            or _profiles_problem(sidecar)
        )
        if reason is None:
            fitting.append((directory, sidecar))
        else:
            misfits.append(f"{directory.name} does not fit: {reason}; build it again here: {_command(bundle, sidecar)}")
    for directory, sidecar in sorted(fitting, key=lambda entry: str(entry[1].get("created")), reverse=True):
        reason = damage(directory, sidecar, PLAN, hashes=hashes)
        if reason is None:
            return Plan(directory.name, directory / PLAN, _profiles(sidecar))
        misfits.append(f"{directory.name} is damaged: {reason}; build it again here: {_command(bundle, sidecar)}")
    if misfits:
        raise EngineMismatch(misfits[0])
    wanted = {"backend": library.backend, "tower": tower}
    raise BackendMissing(
        f"{bundle.directory} has no {library.backend} engine of its {tower} tower; build one on this machine: "
        f"{_command(bundle, wanted)}"
    )


def gpu_difference(sidecar: Mapping[str, Any], gpu: Gpu) -> str | None:
    """Why a plan is not for this GPU, in words; None if it is."""
    targets = sidecar.get("targets")
    if isinstance(targets, list):
        if gpu.sm in targets:
            return None
        return f"it was compiled for {', '.join(map(str, targets))}, this is {gpu} ({gpu.sm})"
    return difference({"gpu": sidecar.get("gpu")}, {"gpu": gpu.facts()})


def open_plan(bundle: Bundle, tower: str, library: Library, gpu: Gpu) -> TensorRTSession:
    """A session of the plan that fits; raises as `find_plan` and `TensorRTSession`."""
    plan = find_plan(bundle, tower, library, gpu)
    return session_of(bundle, tower, plan, library, gpu)


def session_of(
    bundle: Bundle, tower: str, plan: Plan, library: Library, gpu: Gpu, *, keeps_kernels: bool = True
) -> TensorRTSession:
    """A session of a plan.

    Args:
        keeps_kernels: what TensorRT-RTX compiles for this GPU is kept beside the plan, where that can be written to.
    """
    return TensorRTSession(
        plan.path, gpu=gpu, library=library, profiles=plan.profiles, key=plan.key,
        pad=bundle.special_ids["pad"] if tower == "text" else 0,
        cache=plan.path.with_name(f"runtime-{gpu.sm}.cache") if keeps_kernels else None,
    )  # fmt: skip


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
