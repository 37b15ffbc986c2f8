"""The range probe: how large each value of a graph gets on given inputs, by channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from jinaclip.backends.base import Arrays
from jinaclip.backends.onnxruntime.cpu import OnnxRuntimeSession
from jinaclip_engines.graph import Ops, read, tidy


def channel_ranges(
    graph: Path, names: Sequence[str], inputs: Iterable[Arrays]
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Largest |x| of each channel (last axis) of the named values.

    Args:
        graph: an .onnx file.
        names: of float32 values [..., channels] in it.
        inputs: what to run it with.

    Returns:
        By name, float32 [channels]; and for each of `inputs`, the graph's own outputs by name.
    """
    model = read(graph)
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    last = list(model.graph)[-1]
    wanted = {}
    with Ops(model, before=last) as op:
        for name in dict.fromkeys(names):
            value = by_name[name]
            # Over all axes but the last, whatever their number: as one matrix [rows, channels].
            rows = op("Flatten", [op("Abs", [value])], axis=-1)
            wanted[name] = op("ReduceMax", [rows, op.const(np.array([0]))], keepdims=0)
    for name, value in wanted.items():
        value.name = f"range of {name}"
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None])
        model.graph.outputs.append(value)
    largest: dict[str, np.ndarray] = {}
    outputs = []
    probe = graph.with_name(f".{graph.stem}.probe.onnx")  # beside the weights, which it names relative to itself
    try:
        tidy(model)
        ir.save(model, probe)
        session = OnnxRuntimeSession(probe)
        for batch in inputs:
            found = session.run(batch)
            for name in wanted:
                new = found.pop(f"range of {name}")
                largest[name] = np.maximum(largest.get(name, new), new)
            outputs.append(found)
        session.close()
    finally:
        probe.unlink(missing_ok=True)
    return largest, outputs
