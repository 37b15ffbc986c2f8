"""Passes for ONNX Runtime on a CPU. The rewritten graph gives the same vectors and runs faster.

Each pass takes a graph of one tower, in any precision, modifies it in place and returns the number of changes.
`for_cpu` runs them in order. docs/decisions/014 has the measured gain of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import (
    FULL,
    MICROSOFT,
    Ops,
    Pass,
    array,
    attributes,
    nodes,
    only_users,
    run_passes,
)
from jinaclip_engines.passes.attention import before_split, head_size, mask_of
from jinaclip_engines.passes.cls_pooling import last_block_for_cls
from jinaclip_engines.passes.unpadding import unpad

# Above this many tokens attention runs in tiles, so that its memory grows linearly with the length, not quadratically.
# Below it, the plain kernel is as fast and supports padding.
TILED_ABOVE = 512


def for_cpu(model: ir.Model, heads: int, names: Sequence[str] | None = None) -> dict[str, int]:
    """Run passes.

    Args:
        model: a standard graph of one tower; modified in place.
        heads: attention heads of the tower.
        names: passes to run, a subset of PASSES in their order; None runs all.

    Returns:
        The number of changes by pass.

    Raises:
        PassError: the graph does not have the structure of a standard graph.
    """
    return run_passes(model, heads, {name: PASSES[name] for name in (PASSES if names is None else names)})


def token_major(model: ir.Model, heads: int) -> int:
    """Run attention and rotary positions on [B, tokens, width], the linear layers' output, to avoid transposes.

    ONNX Runtime's kernels split the heads while reading.
    """
    attentions = nodes(model, "Attention")
    for attention in attentions:
        q, k, v, *mask = attention.inputs
        merged = only_users(attention.outputs[0], "Transpose", "Reshape")
        sources = [source for value in (q, k, v) if (source := before_split(value)) is not None]
        if not merged or len(sources) < 3:
            raise PassError("an Attention node is not between a standard graph's reshapes; export the bundle again")
        with Ops(model, before=attention) as op:
            inputs = []
            for value, rotary in sources:
                if rotary is not None:
                    tables = rotary.inputs[1:]
                    value = op("RotaryEmbedding", [value, *tables], num_heads=heads, **_interleaved(rotary))
                inputs.append(value)
            y = op("Attention", [*inputs, *mask], q_num_heads=heads, kv_num_heads=heads)
            op.replace(merged[-1].outputs[0], y)
    return len(attentions)


def tile_attention(model: ir.Model, heads: int) -> int:
    """Compute attention in tiles, without a matrix of all scores, for images and for long texts without padding.

    The tiled kernel does not support a mask. Long texts with padding use the plain kernel, which needs memory for the
    matrix of all scores.
    """
    attentions = nodes(model, "Attention")
    tiled = {"num_heads": heads, "scale": float(1 / np.sqrt(head_size(model)))}
    unpadded: ir.Value | None = None
    for attention in attentions:
        operands = attention.inputs[:3]
        mask = mask_of(attention)
        with Ops(model, before=attention) as op:
            if mask is None:
                y = op("MultiHeadAttention", operands, MICROSOFT, **tiled)
            else:
                if unpadded is None:  # all blocks have the same mask
                    unpadded = _long_without_padding(op, mask)
                then = _branch("tiled", "MultiHeadAttention", operands, MICROSOFT, tiled)
                other = _branch("masked", "Attention", attention.inputs, "", attributes(attention))
                y = op("If", [unpadded], then_branch=then, else_branch=other)
                model.graph.opset_imports.setdefault(MICROSOFT, 1)
            op.replace(attention.outputs[0], y)
    return len(attentions)


def integer_gemm(model: ir.Model, heads: int) -> int:
    """Fuse `MatMulInteger`, the cast of its sums and the scale of its columns, which saves two passes over y."""
    count = 0
    for matmul in nodes(model, "MatMulInteger"):
        scaled = only_users(matmul.outputs[0], "Cast", "Mul")
        scale = scaled[-1].inputs[1] if scaled else None
        if array(scale) is None:
            continue
        x, weight, zero = matmul.inputs
        with Ops(model, before=matmul) as op:
            one = op.const(np.float32(1), "one")
            y = op("MatMulIntegerToFloat", [x, weight, one, scale, zero], MICROSOFT)
            op.replace(scaled[-1].outputs[0], y)
        count += 1
    return count


PASSES: Mapping[str, Pass] = {
    "last_block_for_cls": last_block_for_cls,
    "token_major": token_major,
    "unpad": unpad,
    "tile_attention": tile_attention,
    "integer_gemm": integer_gemm,
}


def _interleaved(rotary: ir.Node) -> dict[str, Any]:
    return {"interleaved": 1} if attributes(rotary).get("interleaved") else {}


def _long_without_padding(op: Ops, mask: ir.Value) -> ir.Value:
    """A bool value: whether there are more than TILED_ABOVE tokens and none of them is padding."""
    least = op("ReduceMin", [op("Cast", [mask], to=ir.DataType.INT32)], keepdims=0)
    tokens = op("Squeeze", [op("Shape", [mask], start=3, end=4)])
    long = op("Greater", [tokens, op.const(np.int64(TILED_ABOVE))])
    return op("And", [op("Cast", [least], to=ir.DataType.BOOL), long])


def _branch(
    name: str, op_type: str, inputs: Sequence[ir.Value | None], domain: str, attributes: Mapping[str, object]
) -> ir.Graph:
    """A subgraph of one node that reads values of the outer graph."""
    node = ir.node(op_type, inputs, dict(attributes), domain=domain)  # type: ignore[arg-type]
    node.outputs[0].type = ir.TensorType(FULL)
    return ir.Graph([], [node.outputs[0]], nodes=[node], name=name)
