"""Prepare a bundle's graph for ONNX Runtime.

For this machine's CPU: run the passes and ONNX Runtime's own optimisations, and pack the weights. The prepared graph
opens several times faster. Its weights are memory-mapped from a file, so processes share them, and they have the layout
that this CPU's kernels read. The graph is therefore only valid for these CPU features and this onnxruntime version.
For CUDA: run the passes on the fp16 graph. The result is valid on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinaclip.backends.onnxruntime.library import import_onnxruntime, open_onnxruntime, session_options
from jinaclip.backends.onnxruntime.prepared_graphs import GRAPH, find_prepared, required_facts
from jinaclip.bundle.engines import engine_key
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError
from jinaclip_engines.graph import delete, read, write
from jinaclip_engines.passes.onnxruntime_cpu import TILED_ABOVE, for_cpu
from jinaclip_engines.passes.onnxruntime_cuda.pipeline import for_cuda
from jinaclip_engines.store import write_engine

# Precisions that are prepared for each device. On CPUs, ONNX Runtime has no float16 kernels. On GPUs, fp32 graphs run
# without preparation.
PREPARED_PRECISIONS = {"cpu": ("fp32", "int8"), "cuda": ("fp16",)}


def prepare(
    bundle: Bundle, tower: str, precision: str, device: str = "cpu", *, operators: bool = False, force: bool = False
) -> tuple[str, bool]:
    """Write the prepared graph of one tower to `engines/<key>/`, in the bundle or in its cache directory.

    Args:
        bundle: the bundle that has the graph.
        tower: "text" or "image".
        precision: one of PREPARED_PRECISIONS[device].
        device: "cpu" or "cuda".
        operators: for "cuda", whether to use jinaclip's own CUDA operators.
        force: prepare the graph again even if a usable one exists.

    Returns:
        The key, and whether the graph was prepared by this call.

    Raises:
        BackendError: the graph cannot be prepared or written. Partial files are removed.
    """
    found, _ = find_prepared(bundle, tower, precision, device, operators=operators)
    if found is not None and found.operators == operators and not force:
        return found.key, False

    def fill(directory: Path) -> dict[str, Any]:
        model, heads = read(bundle.graph(tower, precision)), bundle.tower(tower).heads
        if device == "cuda":
            passes = for_cuda(model, heads, operators=operators)
            write(model, directory / GRAPH)
            return {"passes": passes}
        passes = for_cpu(model, heads)
        rewritten = directory / "rewritten.onnx"
        write(model, rewritten)
        _optimise(rewritten, directory / GRAPH, f"{precision} {tower} graph")
        delete(rewritten)
        tiled = passes["tile_attention"] and tower == "text"
        return {"passes": passes, "tiled_above": TILED_ABOVE if tiled else None, "unpadded": passes["unpad"] > 0}

    facts = required_facts(bundle, tower, precision, device, operators=operators)
    write_engine(bundle, facts, fill)
    return engine_key(facts), True


def _optimise(graph: Path, optimised: Path, name: str) -> None:
    """Write a graph as ONNX Runtime optimises it for this CPU, with packed weights. `name` is for the error message."""
    ort = import_onnxruntime()
    options = session_options(ort)
    options.optimized_model_filepath = str(optimised)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{optimised.name}.data"
    )
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        open_onnxruntime(ort, graph, options, None)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise BackendError(f"onnxruntime {ort.__version__} cannot prepare the {name}: {error}") from error
