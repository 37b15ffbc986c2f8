"""Build the engine of one tower: rewrite the graph, compile it, check the plan, run the self-test, write the engine."""

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
from jinaclip.backends.tensorrt.engine import Plan
from jinaclip.backends.tensorrt.library import Library
from jinaclip.backends.tensorrt.plans import PLAN, PRECISION, required_facts, session_of
from jinaclip.bundle.engines import ENGINES, damage, difference, engine_key, engines_of
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError, BackendMissing
from jinaclip_engines.graph import read, signature, write
from jinaclip_engines.passes.tensorrt import for_tensorrt
from jinaclip_engines.store import graph_bytes, write_engine
from jinaclip_engines.tensorrt.compiler import FLAGS, Compiled, compile_plan, default_targets


@dataclass(frozen=True)
class Where:
    """The GPU or GPU generations that engines are built for.

    Attributes:
        gpu: this machine's GPU; None if engines are compiled ahead of time.
        targets: GPU generations to compile for ahead of time, TensorRT-RTX only; () to compile for `gpu`.
    """

    gpu: Gpu | None
    targets: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Fields of the sidecar."""
        return {
            "gpu": None if self.gpu is None else self.gpu.facts(),
            "targets": list(self.targets) or None,
        }


def where_to_build(library: Library, device: int, targets: Sequence[str] | None) -> Where:
    """Choose what to build for: this machine's GPU, or ahead of time for `targets`.

    Without a GPU, TensorRT-RTX compiles ahead of time for all supported generations.

    Args:
        library: TensorRT or TensorRT-RTX.
        device: index of the GPU.
        targets: GPU generations to compile for ahead of time, or None.

    Raises:
        BackendMissing: there is no GPU, and this backend needs one to build.
        BackendError: a target is unknown, or the backend does not support targets.
    """
    if targets and library.backend == "tensorrt":
        raise BackendError("--target is only supported by tensorrt-rtx; TensorRT builds for this machine's GPU")
    problem = driver_problem()
    if library.backend == "tensorrt":
        if problem:
            raise BackendMissing(
                f"TensorRT builds on the GPU that the engine will run on, but {problem}; "
                "--backend tensorrt-rtx can compile without a GPU"
            )
        return Where(gpu(device), ())
    known = default_targets(library)
    if unknown := set(targets or ()) - set(known):
        raise BackendError(f"--target {sorted(unknown)[0]} is unknown; TensorRT-RTX supports {', '.join(known)}")
    if targets:
        return Where(None, tuple(target for target in known if target in targets))
    return Where(None, known) if problem else Where(gpu(device), ())


@dataclass(frozen=True)
class Built:
    """Result of `build_engine`.

    Attributes:
        key: key of the engine.
        new: whether the engine was built by this call; False if a usable one existed.
        sidecar: content of the engine's sidecar file.
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
        bundle: the bundle that has the tower's fp16 graph.
        tower: "text" or "image".
        library: TensorRT or TensorRT-RTX.
        where: GPU or GPU generations to build for.
        policy: one of jinaclip_engines.passes.tensorrt.POLICIES.
        profiles: optimisation profiles of the tower.
        profile_set: name or file of the profiles, recorded for the command that rebuilds the engine.
        workspace_mib: largest scratch memory of a kernel, in MiB; None uses the GPU's memory.
        force: build even if a usable engine exists.
        stage: function that receives a line of text at the start of each step.

    Raises:
        BundleError: the bundle has no fp16 graph of the tower.
        BuildError: the engine could not be built or does not meet the requirements. It is not written.
        SelfTestFailed: the engine was run on this machine's GPU and did not pass the self-test.
    """
    stage(f"rewriting the {PRECISION} graph ({policy})")
    model = read(bundle.graph(tower, PRECISION))
    operator = library.sums_attention_in_float32
    expected = for_tensorrt(model, policy, attention_operator=operator)
    facts = {
        **required_facts(bundle, tower, library),
        "policy": policy,
        "attention": "operator" if operator else "spelled out",
        "rewritten": signature(model),
        "profiles": [profile.to_json() for profile in profiles],
        "flags": {**FLAGS, "workspace_mib": workspace_mib},
        **where.facts(),
    }
    key = engine_key(facts)
    if not force and (existing := _existing(bundle, tower, library, facts, key, stage)) is not None:
        return Built(key, False, existing)
    sidecar: dict[str, Any] = {}

    def fill(directory: Path) -> Mapping[str, Any]:
        start = time.monotonic()
        graph = directory / "rewritten.onnx"
        write(model, graph)
        compiled = compile_plan(
            library, graph, expected, policy, profiles, targets=where.targets, workspace_mib=workspace_mib,
            timing_cache=_timing_cache(bundle, library, where), stage=stage,
        )  # fmt: skip
        graph.unlink()
        graph.with_name(f"{graph.name}.data").unlink()
        (directory / PLAN).write_bytes(memoryview(compiled.plan))
        sidecar.update(_compiled_facts(compiled, where, profile_set, time.monotonic() - start))
        if where.gpu is not None:
            stage("self-test")
            sidecar["self_test"] = _self_test(
                bundle, tower, Plan(key, directory / PLAN, tuple(profiles)), library, where.gpu
            )
        return sidecar

    return Built(write_engine(bundle, facts, 4 * graph_bytes(bundle, tower, PRECISION), fill), True, facts | sidecar)


def _existing(
    bundle: Bundle, tower: str, library: Library, facts: Mapping[str, Any], key: str, stage: Callable[[str], None]
) -> dict[str, Any] | None:
    """Sidecar of a usable engine with this key; None if there is none."""
    for directory, sidecar in engines_of(bundle, tower, PRECISION, library.backend):
        if directory.name == key and difference(sidecar, facts) is None:
            stage("checking the SHA-256 of the existing engine")
            if damage(directory, sidecar, PLAN, hashes=True) is None:
                return sidecar
    return None


def _compiled_facts(compiled: Compiled, where: Where, profile_set: str, seconds: float) -> dict[str, Any]:
    """Fields of the sidecar that the compilation gives; the self-test has not run."""
    return {
        "profile_set": profile_set,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "inputs": list(compiled.inputs),
        "outputs": list(compiled.outputs),
        "report": compiled.report.to_json(),
        "driver": None if where.gpu is None else where.gpu.driver,
        "self_test": None,
    }


def _timing_cache(bundle: Bundle, library: Library, where: Where) -> Path | None:
    """Path of TensorRT's timing cache. There is one per version and GPU, shared by towers and profiles."""
    if where.gpu is None or library.backend != "tensorrt":
        return None
    name = engine_key({"tower": "timing", "precision": library.version, "backend": "tensorrt", **where.gpu.facts()})
    return bundle.note_directory / ENGINES / f"{name}.cache"


def _self_test(bundle: Bundle, tower: str, plan: Plan, library: Library, device: Gpu) -> dict[str, float | bool]:
    session = session_of(bundle, tower, plan, library, device, keeps_kernels=False)
    try:
        return run_self_test(bundle, tower, PRECISION, session, always=True)
    finally:
        session.close()
