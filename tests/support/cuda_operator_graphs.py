"""Graphs for the CUDA provider, run on a CPU: the host build of the operators, and what else has no CPU kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from jinaclip_engines.graph import MICROSOFT, Ops, attributes, nodes, read, write

HALF, FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT


def run_operators(path: Path, library: Path | None, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a graph by name.

    Args:
        path: a graph that `for_cuda` made.
        library: the host build of the operators; None for a graph without them.
    """
    model = read(path)
    if nodes(model, "PackedMultiHeadAttention", MICROSOFT):
        spell_out_packed_attention(model)
        path = path.with_name(f"{path.stem}-spelled-out.onnx")
        write(model, path)
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    used = {value.name for value in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in inputs.items() if k in used}), strict=True))


def packed(texts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of a packed text graph: ids of each text, without padding."""
    lengths = [len(text) for text in texts]
    return {
        "input_ids": np.concatenate(texts).astype(np.int64),
        "positions": np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        "offsets": np.cumsum([0, *lengths]).astype(np.int32),
        "token_offset": np.full((len(texts), max(lengths)), -1, np.int32),  # only its shape is read
    }


def spell_out_packed_attention(model: ir.Model) -> None:
    """PackedMultiHeadAttention has no CPU kernel: attention in float32 over all tokens, to those of the same text."""
    packed_nodes = nodes(model, "PackedMultiHeadAttention", MICROSOFT)
    positions = next(value for value in model.graph.inputs if value.name == "positions")
    with Ops(model, before=packed_nodes[0]) as op:
        begins = op("Equal", [positions, op.const(np.int32(0))])
        text = op("CumSum", [op("Cast", [begins], to=ir.DataType.INT32), op.const(np.int64(0))])  # of each token
        rows, columns = (op("Unsqueeze", [text, op.const(np.array([axis]))]) for axis in (1, 0))
        same = op("Equal", [rows, columns])  # [N, N]
    for node in packed_nodes:
        heads = int(attributes(node)["num_heads"])
        with Ops(model, before=node) as op:
            first = op.const(np.array([0]))
            q, k, v = (op("Unsqueeze", [op("Cast", [value], to=FULL), first]) for value in node.inputs[:3])
            y = op("Attention", [q, k, v, same], q_num_heads=heads, kv_num_heads=heads)
            op.replace(node.outputs[0], op("Cast", [op("Squeeze", [y, first])], to=HALF))
