"""Build the engine of one tower: rewrite the graph, compile it, check the plan, run the self-test, write the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx_ir as ir

from jinaclip.backends.cuda.gpu import Gpu, driver_problem, gpu
from jinaclip.backends.shapes import Profile
from jinaclip.backends.tensorrt.engine import Plan
from jinaclip.backends.tensorrt.library import Library
from jinaclip.backends.tensorrt.plans import PLAN, PRECISION, required_facts
from jinaclip.backends.tensorrt.session import TensorRTSession
from jinaclip.bundle.engines import ENGINES, damage, difference, engine_key, engines_of
from jinaclip.bundle.manifest import Bundle
from jinaclip.encoders import ENCODERS
from jinaclip.errors import BackendError, BackendMissing
from jinaclip_engines.graph import delete, read, signature, write
from jinaclip_engines.passes.tensorrt import Expected, for_tensorrt
from jinaclip_engines.store import write_engine
from jinaclip_engines.tensorrt.compiler import FLAGS, Compiled, compile_plan, default_targets


@dataclass(frozen=True)
class BuildTarget:
    """The GPU or GPU generations that engines are built for.

    Attributes:
        gpu: this machine's GPU; None if engines are compiled ahead of time.
        targets: GPU generations to compile for ahead of time, TensorRT-RTX only; () to compile for `gpu`.
    """

    gpu: Gpu | None
    targets: tuple[str, ...]


def choose_target(library: Library, device: int, targets: Sequence[str] | None) -> BuildTarget:
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
        return BuildTarget(gpu(device), ())
    known = default_targets(library)
    if unknown := set(targets or ()) - set(known):
        raise BackendError(f"--target {sorted(unknown)[0]} is unknown; TensorRT-RTX supports {', '.join(known)}")
    if targets:
        return BuildTarget(None, tuple(target for target in known if target in targets))
    return BuildTarget(None, known) if problem else BuildTarget(gpu(device), ())


@dataclass(frozen=True)
class Built:
    """Result of `EngineBuilder.build`.

    Attributes:
        key: key of the engine.
        new: whether the engine was built by this call; False if a usable one existed.
        sidecar: content of the engine's sidecar file.
    """

    key: str
    new: bool
    sidecar: Mapping[str, Any]


@dataclass(frozen=True)
class EngineBuilder:
    """Builds the engine of one tower.

    Attributes:
        bundle: the bundle that has the tower's fp16 graph.
        tower: "text" or "image".
        library: TensorRT or TensorRT-RTX.
        target: GPU or GPU generations to build for.
        policy: one of jinaclip_engines.passes.tensorrt.POLICIES.
        profiles: optimisation profiles of the tower.
        profile_set: name or file of the profiles, recorded for the command that rebuilds the engine.
        workspace_mib: largest scratch memory of a kernel, in MiB; None uses the GPU's memory.
        progress: function that receives a line of text at the start of each step.
    """

    bundle: Bundle
    tower: str
    library: Library
    target: BuildTarget
    policy: str
    profiles: tuple[Profile, ...]
    profile_set: str
    workspace_mib: int | None = None
    progress: Callable[[str], None] = lambda line: None

    def build(self, *, force: bool = False) -> Built:
        """Build the engine.

        Args:
            force: build even if a usable engine exists.

        Raises:
            BundleError: the bundle has no fp16 graph of the tower.
            BuildError: the engine could not be built or does not meet the requirements. It is not written.
            SelfTestFailed: the engine was run on this machine's GPU and did not pass the self-test.
        """
        self.progress(f"rewriting the {PRECISION} graph ({self.policy})")
        model = read(self.bundle.graph(self.tower, PRECISION))
        operator = self.library.sums_attention_in_float32
        expected = for_tensorrt(model, self.policy, attention_operator=operator)
        gpu = self.target.gpu
        facts = {
            **required_facts(self.bundle, self.tower, self.library),
            "policy": self.policy,
            "attention": "operator" if operator else "spelled out",
            "rewritten": signature(model),
            "profiles": [profile.to_json() for profile in self.profiles],
            "flags": {**FLAGS, "workspace_mib": self.workspace_mib},
            "gpu": None if gpu is None else gpu.facts(),
            "targets": list(self.target.targets) or None,
        }
        key = engine_key(facts)
        if not force and (existing := self._existing(key, facts)) is not None:
            return Built(key, False, existing)

        def fill(directory: Path) -> dict[str, Any]:
            start = time.monotonic()
            compiled = self._compile(model, expected, directory)
            plan = Plan(key, directory / PLAN, self.profiles)
            plan.path.write_bytes(memoryview(compiled.plan))
            return {
                "profile_set": self.profile_set,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - start, 1),
                "inputs": list(compiled.inputs),
                "outputs": list(compiled.outputs),
                "report": asdict(compiled.report),
                "driver": None if gpu is None else gpu.driver,
                "self_test": None if gpu is None else self._self_test(plan, gpu),
            }

        return Built(key, True, write_engine(self.bundle, facts, fill))

    def _existing(self, key: str, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Sidecar of a usable engine with this key; None if there is none."""
        for directory, sidecar in engines_of(self.bundle, self.tower, PRECISION, self.library.backend):
            if directory.name == key and difference(sidecar, facts) is None:
                self.progress("checking the SHA-256 of the existing engine")
                if damage(directory, sidecar, PLAN, hashes=True) is None:
                    return sidecar
        return None

    def _compile(self, model: ir.Model, expected: Expected, directory: Path) -> Compiled:
        graph = directory / "rewritten.onnx"
        write(model, graph)
        compiled = compile_plan(
            self.library,
            graph,
            expected,
            self.policy,
            self.profiles,
            targets=self.target.targets,
            workspace_mib=self.workspace_mib,
            timing_cache=self._timing_cache(),
            progress=self.progress,
        )
        delete(graph)
        return compiled

    def _timing_cache(self) -> Path | None:
        """Path of TensorRT's timing cache. There is one per version and GPU, shared by towers and profiles."""
        gpu, library = self.target.gpu, self.library
        if gpu is None or library.backend != "tensorrt":
            return None
        name = engine_key({"tower": "timing", "precision": library.version, "backend": "tensorrt", **gpu.facts()})
        return self.bundle.note_directory / ENGINES / f"{name}.cache"

    def _self_test(self, plan: Plan, gpu: Gpu) -> dict[str, float | bool]:
        self.progress("self-test")
        pad = self.bundle.special_ids["pad"] if self.tower == "text" else 0
        session = TensorRTSession(plan, gpu=gpu, library=self.library, pad=pad)
        with closing(session):
            return ENCODERS[self.tower](self.bundle, PRECISION, session).check()
