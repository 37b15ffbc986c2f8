"""Every name of TensorRT's Python interface that we use exists in each version that we serve.

The full TensorRT needs its vendor's libraries even to be imported; tensorrt_names.json holds the names of the public
interface of three releases, by class, as their bindings define them. TensorRT-RTX is asked itself where it is there.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RELEASES: dict[str, dict[str, set[str]]] = {
    release: {name: set(members.split()) for name, members in classes.items()}
    for release, classes in json.loads((Path(__file__).parent / "tensorrt_names.json").read_text("utf-8")).items()
}
# By file, which class each expression is an object of; "" is the module itself.
OBJECTS = {
    "engines/jinaclip_engines/tensorrt/compiler.py": {
        "trt": "", "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
        "config": "IBuilderConfig", "layer": "ILayer", "attention": "IAttention", "shapes": "IOptimizationProfile",
        "cache": "ITimingCache", "engine": "ICudaEngine", "inspector": "EngineInspector", "tensor": "ITensor",
        "source": "ITensor", "attention.mask": "ITensor", "config.get_timing_cache()": "ITimingCache",
        "layer.get_output(output)": "ITensor", "trt.Runtime(logger_of(library))": "Runtime",
        "library.module": "",
    },
    "runtime/jinaclip/backends/tensorrt/engine.py": {
        "trt": "", "self._engine": "ICudaEngine", "self._runtime": "Runtime", "context": "IExecutionContext",
        "config": "IRuntimeConfig", "self._runtime_cache": "IRuntimeCache",
    },
    "runtime/jinaclip/backends/tensorrt/worker.py": {"context": "IExecutionContext"},
    "runtime/jinaclip/backends/tensorrt/library.py": {"trt": "", "module": ""},
}  # fmt: skip
# Of TensorRT-RTX alone, and used behind a question for the backend.
RTX_ONLY = {
    "ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability",
    "DynamicShapesKernelSpecializationStrategy", "DynamicShapesKernelSpecializationStrategy.EAGER",
    "CudaGraphStrategy", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE", "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy", "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache", "IRuntimeCache.serialize", "IRuntimeCache.deserialize",
}  # fmt: skip
# The bindings return the base class of an attention's layer, and we give it its own.
NARROWED = {"ILayer.attention": "IAttentionBoundaryLayer.attention"}
# Not TensorRT's, but Python's.
PYTHON = {"__version__", "__class__", "__init__"}


def used(file: str) -> set[str]:
    """ "IBuilderConfig.max_aux_streams", "BuilderFlag.TF32", … of a file."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        if not isinstance(node, ast.Attribute) or node.attr in PYTHON:
            continue
        owner = ast.unparse(node.value)
        kind = OBJECTS[file].get(owner)
        if kind is None and owner.startswith("trt.") and owner.replace(".", "").isidentifier():
            kind = owner.removeprefix("trt.")
        if kind is not None:
            name = f"{kind}.{node.attr}".removeprefix(".")
            found.add(NARROWED.get(name, name))
    return found


NAMES = {(file, name) for file in OBJECTS for name in used(file)}


def has(release: dict[str, set[str]], name: str) -> bool:
    owner, _, member = name.rpartition(".")
    return member in release.get(owner, set())


def test_the_files_are_read() -> None:
    assert len(NAMES) >= 60
    names = {name for _, name in NAMES}
    assert {"IBuilderConfig.clear_flag", "BuilderFlag.TF32", "IExecutionContext.execute_async_v3", "ILogger"} <= names
    assert names >= RTX_ONLY


@pytest.mark.parametrize("release", RELEASES)
def test_every_name_exists(release: str) -> None:
    missing = {name for _, name in NAMES if not has(RELEASES[release], name)}
    assert missing == (RTX_ONLY if release.startswith("tensorrt ") else set())


def test_an_engine_may_never_bring_code_for_the_host() -> None:
    """`engine_host_code_allowed` lets a plan run what it likes in this process; it exists, and nobody sets it."""
    assert all(has(release, "Runtime.engine_host_code_allowed") for release in RELEASES.values())
    for root in ("runtime", "engines", "export", "bench"):
        for path in (ROOT / root).rglob("*.py"):
            assert "engine_host_code_allowed" not in path.read_text("utf-8"), path


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_the_installed_tensorrt_rtx_has_them() -> None:
    import tensorrt_rtx

    for _, name in NAMES:
        value = tensorrt_rtx
        for part in name.split("."):
            assert hasattr(value, part), name
            value = getattr(value, part)


def test_cuda_bindings_have_what_we_call() -> None:
    api = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    tree = ast.parse((ROOT / "runtime/jinaclip/backends/cuda/api.py").read_text("utf-8"))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in ("api", "runtime")
    }
    assert len(names) >= 18
    for name in names:
        assert hasattr(api, name), name
    assert hasattr(api.cudaMemcpyKind, "cudaMemcpyHostToDevice") and hasattr(
        api.cudaMemcpyKind, "cudaMemcpyDeviceToHost"
    )
    assert hasattr(api.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
