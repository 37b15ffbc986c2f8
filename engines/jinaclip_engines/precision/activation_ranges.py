"""Calibration: measure the largest absolute value of each channel of a graph's activations on given inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_ir as ir

from jinaclip.backends.base import Arrays
from jinaclip.backends.onnxruntime.cpu import OnnxRuntimeSession
from jinaclip_engines.graph import FULL, Ops, read, tidy


def channel_ranges(
    graph: Path, names: Sequence[str], inputs: Iterable[Arrays]
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Largest |x| of each channel (last axis) of the named values.

    Args:
        graph: an .onnx file.
        names: names of float32 values [..., channels] in the graph.
        inputs: calibration inputs to run the graph with.

    Returns:
        The ranges by name, float32 [channels]; and for each of `inputs`, the graph's outputs by name.
    """
    model = read(graph)
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    last = list(model.graph)[-1]
    wanted = {}
    with Ops(model, before=last) as op:
        for name in dict.fromkeys(names):
            value = by_name[name]
            # Flatten to a matrix [rows, channels], to reduce over all axes except the last.
            rows = op("Flatten", [op("Abs", [value])], axis=-1)
            wanted[name] = op("ReduceMax", [rows, op.const(np.array([0]))], keepdims=0)
    for name, value in wanted.items():
        value.name = f"range of {name}"
        value.type, value.shape = ir.TensorType(FULL), ir.Shape([None])
        model.graph.outputs.append(value)
    largest: dict[str, np.ndarray] = {}
    outputs = []
    probe = graph.with_name(f".{graph.stem}.probe.onnx")  # paths of weights are relative to it
    try:
        tidy(model)
        ir.save(model, probe)
        with closing(OnnxRuntimeSession(probe)) as session:
            for batch in inputs:
                found = session.run(batch)
                for name in wanted:
                    new = found.pop(f"range of {name}")
                    largest[name] = np.maximum(largest.get(name, new), new)
                outputs.append(found)
    finally:
        probe.unlink(missing_ok=True)
    return largest, outputs
