"""Compile a graph to a plan with TensorRT or TensorRT-RTX: parse, fix the attention masks, compile, check the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinaclip.backends.shapes import Profile
from jinaclip.backends.tensorrt.library import Library, Messages, logger_of
from jinaclip.bundle.files import write_atomically
from jinaclip_engines.errors import BuildError
from jinaclip_engines.passes.tensorrt import Expected
from jinaclip_engines.tensorrt.build_report import Kernel, Report, read_kernels, report_on

# Build settings of every engine. They are part of its key.
FLAGS = {
    "tf32": False,  # TF32, on by default in TensorRT, rounds float32 operands to 10 bits
    "strongly_typed": True,  # types are taken from the graph; TensorRT 11 has no other mode
    "max_aux_streams": 0,  # a single stream: no events between kernels, and a CUDA graph can capture a run
    "hardware_compatibility": "none",  # only this GPU model
}


@dataclass(frozen=True)
class Compiled:
    """A compiled plan and the report on it.

    Attributes:
        plan: bytes of the plan.
        report: report of the checks; it has no problems.
        inputs, outputs: name, dtype and shape of each input and output of the engine. Dynamic sizes are -1.
    """

    plan: Any
    report: Report
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]


def default_targets(library: Library) -> tuple[str, ...]:
    """GPU generations that TensorRT-RTX can compile for ahead of time: ("sm75", "sm80", …)."""
    names = (name for name in dir(library.module.ComputeCapability) if name.startswith("SM"))
    return tuple(sorted((name.lower() for name in names), key=lambda name: int(name[2:])))


def compile_plan(
    library: Library,
    graph: Path,
    expected: Expected,
    policy: str,
    profiles: Sequence[Profile],
    *,
    targets: Sequence[str] = (),
    workspace_mib: int | None = None,
    timing_cache: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Compiled:
    """Compile a graph that `for_tensorrt` wrote.

    Args:
        library: TensorRT or TensorRT-RTX. TensorRT needs a GPU driver; without one its builder may end the process.
        graph: path of the graph.
        expected: requirements that `for_tensorrt` returned.
        policy: one of jinaclip_engines.passes.tensorrt.POLICIES.
        profiles: optimisation profiles.
        targets: for TensorRT-RTX, GPU generations to compile for ahead of time; () for this machine's GPU.
        workspace_mib: largest scratch memory of a kernel, in MiB; None uses the library's default, the GPU's memory.
        timing_cache: file of TensorRT's timing cache, reused between builds; None for no cache.
        progress: function that receives a line of text at the start of each step.

    Raises:
        BuildError: the graph does not compile, or the plan does not meet the requirements, with the names of layers.
    """
    trt = library.module
    compiler = f"{library.backend} {library.version}"
    with Messages(library) as messages:
        builder = trt.Builder(logger_of(library))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger_of(library))
        progress("parsing")
        if not parser.parse_from_file(str(graph)):
            raise BuildError(f"{compiler} cannot parse {graph.name}: {messages.errors()}")
        _rewire_masks(trt, network, expected)
        config = _configure(trt, builder, network, profiles, targets, workspace_mib)
        cache = _load_timing_cache(config, timing_cache)
        for_what = f" for {', '.join(targets)}" if targets else ""
        progress(f"compiling {len(profiles)} profile{'s' if len(profiles) > 1 else ''}{for_what}")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildError(f"{compiler} cannot compile the graph: {messages.errors()}")
        if cache is not None and timing_cache is not None:
            _save_timing_cache(config, timing_cache)
        inputs = tuple(_tensor(trt, network.get_input(index)) for index in range(network.num_inputs))
        outputs = tuple(_tensor(trt, network.get_output(index)) for index in range(network.num_outputs))
        del parser, network, config, builder  # in this order, because they do not keep each other alive
    progress("checking")
    kernels = read_kernels("\n".join(line for _, line in messages.lines)) or _inspect(library, plan)
    records_sums = library.backend == "tensorrt-rtx"
    report = report_on(kernels, memoryview(plan), expected, policy, profiles=len(profiles), records_sums=records_sums)
    if report.problems:
        problems = _listed(report.problems)
        raise BuildError(f"{compiler} did not compile the graph as required: {problems}. Nothing was written")
    return Compiled(plan, report, inputs, outputs)


def _listed(problems: Sequence[str], most: int = 6) -> str:
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _rewire_masks(trt: Any, network: Any, expected: Expected) -> None:
    """Connect every fused attention to the mask before it is expanded, [B, 1, 1, T] instead of [B, 1, T, T].

    ONNX Runtime supports only the expanded mask, so the graph has it. In TensorRT every block would read it from
    memory. This also detects masks that the parser dropped without a warning.
    """
    attentions = list(_attentions(trt, network))
    wanted = set(expected.attention) if expected.mask is not None else set()
    masked = {str(attention.name) for attention in attentions if attention.mask is not None}
    operators = {str(attention.name) for attention in attentions}
    for name in sorted((wanted & operators) - masked):
        raise BuildError(f"{name}: the parser dropped the mask, so padding would change the vectors")
    if not masked:
        return
    source = _tensor_called(network, expected.mask)
    if source is None:
        raise BuildError(f"the parsed network has no tensor {expected.mask!r}, the mask before it is expanded")
    for attention in attentions:
        if attention.mask is not None:
            if attention.mask.dtype != trt.DataType.BOOL:
                raise BuildError(f"{attention.name}: the mask has type {attention.mask.dtype.name}, expected BOOL")
            attention.mask = source


def _attentions(trt: Any, network: Any) -> Any:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if getattr(trt.LayerType, "ATTENTION_INPUT", None) == layer.type:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            yield layer.attention


def _tensor_called(network: Any, name: str | None) -> Any:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            if layer.get_output(output).name == name:
                return layer.get_output(output)
    return None


def _configure(
    trt: Any, builder: Any, network: Any, profiles: Sequence[Profile], targets: Sequence[str], workspace: int | None
) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = FLAGS["max_aux_streams"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names every kernel and the nodes in it
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    source = network.get_input(0)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        shapes.set_shape(source.name, *(_shape(source, profile, corner) for corner in range(3)))
        if config.add_optimization_profile(shapes) < 0:
            raise BuildError(f"the library rejected profile {profile.name} ({profile})")
    return config


def _shape(source: Any, profile: Profile, corner: int) -> tuple[int, ...]:
    """The smallest, optimal or largest shape of the input: [B, T] for ids, [B, …] for pixels."""
    if profile.tokens is not None:
        return profile.batch[corner], profile.tokens[corner]
    return (profile.batch[corner], *tuple(source.shape)[1:])


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    """Load the timing cache of earlier builds; None if there is no cache. A cache of another GPU is ignored."""
    if path is None:
        return None
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def _save_timing_cache(config: Any, path: Path) -> None:
    """Write the timing cache atomically, because builds may run in parallel. A failure to write is ignored."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, bytes(memoryview(config.get_timing_cache().serialize())))


def _tensor(trt: Any, tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": trt.nptype(tensor.dtype).__name__, "shape": list(tensor.shape)}


def _inspect(library: Library, plan: Any) -> list[Kernel]:
    """Read the list of layers from the inspector, if the build log has none. This needs the GPU of the plan."""
    trt = library.module
    engine = trt.Runtime(logger_of(library)).deserialize_cuda_engine(plan)
    if engine is None:
        return []
    inspector = engine.create_engine_inspector()
    return read_kernels(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))
