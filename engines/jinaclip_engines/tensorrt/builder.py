"""A tower of a bundle -> an engine in its store: rewrite, compile, check, run it where its GPU is here, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinaclip.backends.cuda.gpu import Gpu, driver_problem, gpu
from jinaclip.backends.self_test import run_self_test
from jinaclip.backends.shapes import Profile
from jinaclip.backends.tensorrt.library import Library
from jinaclip.backends.tensorrt.plans import PLAN, PRECISION, Plan, required_facts, session_of
from jinaclip.bundle.engines import ENGINES, damage, difference, engine_key, engines_of
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError, BackendMissing
from jinaclip_engines.graph import read, signature, write
from jinaclip_engines.passes.tensorrt import for_tensorrt
from jinaclip_engines.store import graph_bytes, write_engine
from jinaclip_engines.tensorrt.compiler import FLAGS, compile_plan, default_targets


@dataclass(frozen=True)
class Where:
    """What engines are built for.

    Attributes:
        gpu: that is here; None where engines are compiled ahead of time.
        targets: generations to compile for ahead of time, TensorRT-RTX only; () for `gpu`.
    """

    gpu: Gpu | None
    targets: tuple[str, ...]


def where_to_build(library: Library, device: int, targets: Sequence[str] | None) -> Where:
    """The GPU that is here; without one, or with targets, ahead of time, which TensorRT-RTX alone can.

    Raises:
        BackendMissing: there is no GPU, and this backend needs one to build.
        BackendError: a target is unknown, or the backend has none.
    """
    if targets and library.backend == "tensorrt":
        raise BackendError("--target is for tensorrt-rtx: TensorRT builds for the GPU that is here")
    problem = driver_problem()
    if library.backend == "tensorrt":
        if problem:
            raise BackendMissing(
                f"TensorRT builds on the GPU that it will run on, and {problem}; "
                "--backend tensorrt-rtx compiles without one"
            )
        return Where(gpu(device), ())
    known = default_targets(library)
    if unknown := set(targets or ()) - set(known):
        raise BackendError(f"--target {sorted(unknown)[0]} is unknown, TensorRT-RTX compiles for {', '.join(known)}")
    if targets:
        return Where(None, tuple(target for target in known if target in targets))
    return Where(None, known) if problem else Where(gpu(device), ())


@dataclass(frozen=True)
class Built:
    """What `build_engine` did.

    Attributes:
        key: of the engine.
        new: it was made now, and not there already.
        sidecar: what stands beside it.
    """

    key: str
    new: bool
    sidecar: Mapping[str, Any]


def build_engine(
    bundle: Bundle, tower: str, library: Library, where: Where, *, policy: str, profiles: Sequence[Profile],
    profile_set: str, workspace_mib: int | None = None, force: bool = False,
    stage: Callable[[str], None] = lambda line: None,
) -> Built:  # fmt: skip
    """Build one tower's engine.

    Args:
        policy: of jinaclip_engines.passes.tensorrt.POLICIES.
        profile_set: what the profiles were called, for the command that builds them again.
        force: build even what is there.
        stage: told what is done now, a line each.

    Raises:
        BundleError: the bundle has no fp16 graph of the tower.
        BuildError: the engine is not what was asked, and is not written.
        SelfTestFailed: its GPU is here, and it gives other vectors.
    """
    source = bundle.graph(tower, PRECISION)
    stage(f"rewriting the {PRECISION} graph ({policy})")
    model = read(source)
    operator = library.sums_attention_in_float32
    expected = for_tensorrt(model, policy, attention_operator=operator)
    facts = {
        **required_facts(bundle, tower, library),
        "policy": policy,
        "attention": "operator" if operator else "spelled out",
        "rewritten": signature(model),
        "profiles": [profile.to_json() for profile in profiles],
        "flags": {**FLAGS, "workspace_mib": workspace_mib},
        "gpu": None if where.gpu is None else where.gpu.facts(),
        "targets": list(where.targets) or None,
    }
    key = engine_key(facts)
    for directory, sidecar in engines_of(bundle, tower, PRECISION, library.backend):
        if directory.name == key and not force and difference(sidecar, facts) is None:
            stage("comparing the sha256 of what is there")
            if damage(directory, sidecar, PLAN, hashes=True) is None:
                return Built(key, False, sidecar)
    sidecar = {}

    def fill(directory: Path) -> Mapping[str, Any]:
        start = time.monotonic()
        graph = directory / "rewritten.onnx"
        write(model, graph)
        compiled = compile_plan(
            library, graph, expected, policy, profiles, targets=where.targets, workspace_mib=workspace_mib,
            timing_cache=_timing_cache(bundle, library, where), stage=stage,
        )  # fmt: skip
        for path in (graph, graph.with_name(f"{graph.name}.data")):
            path.unlink()
        (directory / PLAN).write_bytes(memoryview(compiled.plan))
        sidecar.update(
            profile_set=profile_set,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - start, 1),
            inputs=list(compiled.inputs),
            outputs=list(compiled.outputs),
            report=compiled.report.to_json(),
            driver=None if where.gpu is None else where.gpu.driver,
            self_test=None,
        )
        if where.gpu is not None:
            stage("self-test")
            plan = Plan(key, directory / PLAN, tuple(profiles))
            sidecar["self_test"] = _self_test(bundle, tower, plan, library, where.gpu)
        return sidecar

    needed = 4 * graph_bytes(bundle, tower, PRECISION)
    written = write_engine(bundle, facts, needed, fill)
    return Built(written, True, {**facts, **sidecar})


def _timing_cache(bundle: Bundle, library: Library, where: Where) -> Path | None:
    """Where TensorRT keeps what it measured: for one version and one GPU, shared by towers and profiles."""
    if where.gpu is None or library.backend != "tensorrt":
        return None
    name = engine_key({"tower": "timing", "precision": library.version, "backend": "tensorrt", **where.gpu.facts()})
    return next(bundle.note_directories()) / ENGINES / f"{name}.cache"


def _self_test(bundle: Bundle, tower: str, plan: Plan, library: Library, device: Gpu) -> dict[str, float | bool]:
    session = session_of(bundle, tower, plan, library, device, keeps_kernels=False)
    try:
        return run_self_test(bundle, tower, PRECISION, session, always=True)
    finally:
        session.close()
