"""Graph -> plan, with TensorRT or TensorRT-RTX: parse, mend what the parser does, compile, and check what came out."""

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

# What every engine is built with, and part of its key.
FLAGS = {
    "tf32": False,  # rounds float32 operands to 10 bits, on by default
    "strongly_typed": True,  # types are the graph's; TensorRT 11 knows nothing else
    "max_aux_streams": 0,  # one stream: no events between kernels, and CUDA graphs can hold a run
    "hardware_compatibility": "none",  # this GPU model
}


@dataclass(frozen=True)
class Compiled:
    """A plan, and what the compiler made of the graph.

    Attributes:
        plan: bytes to write.
        report: held to what was asked; its problems are empty.
        inputs, outputs: of the engine: name, dtype and shape, -1 where it changes.
    """

    plan: Any
    report: Report
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]


def default_targets(library: Library) -> tuple[str, ...]:
    """GPU generations that TensorRT-RTX compiles for without a GPU: ("sm75", "sm80", …)."""
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
    stage: Callable[[str], None] = lambda line: None,
) -> Compiled:
    """Compile a graph that `for_tensorrt` wrote.

    Args:
        library: with TensorRT a driver must be there, or its builder may end the process.
        expected: what `for_tensorrt` returned.
        policy: of jinaclip_engines.passes.tensorrt.POLICIES.
        targets: for TensorRT-RTX, generations to compile for ahead of time; () for the GPU that is here.
        workspace_mib: most memory of a kernel; None leaves it to the library: the GPU's.
        timing_cache: kept there between builds, by TensorRT for one version and GPU.
        stage: told what is done now, a line each.

    Raises:
        BuildError: it does not compile, or into something else than asked; names the layers.
    """
    trt = library.module
    with Messages(library) as messages:
        builder = trt.Builder(logger_of(library))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger_of(library))
        stage("parsing")
        if not parser.parse_from_file(str(graph)):
            raise BuildError(f"{library.backend} {library.version} does not parse {graph.name}: {messages.errors()}")
        _rewire_masks(trt, network, expected)
        config = _configure(trt, builder, network, profiles, targets, workspace_mib)
        cache = _load_timing_cache(config, timing_cache)
        for_what = f" for {', '.join(targets)}" if targets else ""
        stage(f"compiling {len(profiles)} profile{'s' if len(profiles) > 1 else ''}{for_what}")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildError(f"{library.backend} {library.version} does not compile the graph: {messages.errors()}")
        if cache is not None and timing_cache is not None:
            _save_timing_cache(config, timing_cache)
        inputs = tuple(_tensor(trt, network.get_input(index)) for index in range(network.num_inputs))
        outputs = tuple(_tensor(trt, network.get_output(index)) for index in range(network.num_outputs))
        del parser, network, config, builder  # in this order: none keeps another alive
    stage("checking")
    kernels = read_kernels(messages.text) or _inspect(library, plan)
    report = report_on(
        kernels, memoryview(plan), expected, policy, profiles=len(profiles),
        tells_sums=library.backend == "tensorrt-rtx",
    )  # fmt: skip
    if report.problems:
        raise BuildError(
            f"{library.backend} {library.version} made something else of the graph than was asked: "
            + "; ".join(report.problems[:6])
            + (f"; and {len(report.problems) - 6} more" if len(report.problems) > 6 else "")
            + ". Nothing was written"
        )
    return Compiled(plan, report, inputs, outputs)


def _rewire_masks(trt: Any, network: Any, expected: Expected) -> None:
    """Give every fused attention the mask as it is before it is expanded, [B, 1, 1, T] instead of [B, 1, T, T].

    ONNX Runtime takes only the second, so that is what the graph has. Here it would be read from memory by every block;
    and the parser has dropped masks before, without a word.
    """
    attentions = list(_attentions(trt, network))
    wanted = set(expected.attention) if expected.mask is not None else set()
    masked = {str(attention.name) for attention in attentions if attention.mask is not None}
    operators = {str(attention.name) for attention in attentions}
    for name in sorted((wanted & operators) - masked):
        raise BuildError(f"{name}: the parser dropped its mask, so that padding would change the vectors")
    if not masked:
        return
    source = _tensor_called(network, expected.mask)
    if source is None:
        raise BuildError(f"the parser shows no tensor {expected.mask!r}, the mask before it is expanded")
    for attention in attentions:
        if attention.mask is not None:
            if attention.mask.dtype != trt.DataType.BOOL:
                raise BuildError(f"{attention.name}: its mask is {attention.mask.dtype.name}, expected BOOL")
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
            raise BuildError(f"the library does not take profile {profile.name} ({profile})")
    return config


def _shape(source: Any, profile: Profile, corner: int) -> tuple[int, ...]:
    """The least, best or most shape of the input: [B, T] of ids, [B, …] of pixels."""
    if profile.tokens is not None:
        return profile.batch[corner], profile.tokens[corner]
    return (profile.batch[corner], *tuple(source.shape)[1:])


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    """What was measured by earlier builds; None where none is kept. A cache of another GPU is ignored."""
    if path is None:
        return None
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def _save_timing_cache(config: Any, path: Path) -> None:
    """Atomically: builds may run at the same time. Where it cannot be written, the next build measures again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, bytes(memoryview(config.get_timing_cache().serialize())))


def _tensor(trt: Any, tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": trt.nptype(tensor.dtype).__name__, "shape": list(tensor.shape)}


def _inspect(library: Library, plan: Any) -> list[Kernel]:
    """The list of layers from the inspector, where the build log has none: needs the GPU that the plan is for."""
    trt = library.module
    engine = trt.Runtime(logger_of(library)).deserialize_cuda_engine(plan)
    if engine is None:
        return []
    inspector = engine.create_engine_inspector()
    return read_kernels(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))
