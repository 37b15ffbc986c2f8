"""Passes for ONNX Runtime on a CPU. The rewritten graph gives the same vectors and runs faster.

Each pass takes a graph of one tower, in any precision, modifies it in place and returns the number of changes.
`for_cpu` runs them in order. docs/decisions/014 has the measured gain of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import (
    MICROSOFT,
    Ops,
    array,
    attributes,
    constant,
    forget_shapes,
    nodes,
    only_user,
    producer,
    tidy,
)
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
    counts = {}
    for name in PASSES if names is None else names:
        counts[name] = PASSES[name](model, heads)
        tidy(model)
    forget_shapes(model)
    return counts


def token_major(model: ir.Model, heads: int) -> int:
    """Run attention and rotary positions on [B, tokens, width], the linear layers' output, to avoid transposes.

    ONNX Runtime's kernels split the heads while reading.
    """
    count = 0
    for attention in nodes(model, "Attention"):
        q, k, v, *mask = attention.inputs
        merged = only_user(attention.outputs[0], "Transpose")
        flat = merged and only_user(merged.outputs[0], "Reshape")
        sources = [_token_major_source(value) for value in (q, k, v)]
        if flat is None or None in sources:
            raise PassError("an Attention node is not between a standard graph's reshapes; export the bundle again")
        with Ops(model, before=attention) as op:
            inputs = []
            for source in sources:
                assert source is not None
                value, rotary = source
                if rotary is not None:
                    tables = rotary.inputs[1:]
                    value = op("RotaryEmbedding", [value, *tables], num_heads=heads, **_interleaved(rotary))
                inputs.append(value)
            y = op("Attention", [*inputs, *mask], q_num_heads=heads, kv_num_heads=heads)
            op.replace(flat.outputs[0], y)
        count += 1
    return count


def tile_attention(model: ir.Model, heads: int) -> int:
    """Compute attention in tiles, without a matrix of all scores, for images and for long texts without padding.

    The tiled kernel does not support a mask. Long texts with padding use the plain kernel, which needs memory for the
    matrix of all scores.
    """
    count = 0
    unpadded: ir.Value | None = None
    for attention in nodes(model, "Attention"):
        q, k, v, *rest = attention.inputs
        mask = rest[0] if rest else None
        scale = 1 / np.sqrt(_head_size(model, heads))
        tiled = {"num_heads": heads, "scale": float(scale)}
        if mask is None:
            with Ops(model, before=attention) as op:
                y = op("MultiHeadAttention", [q, k, v], MICROSOFT, **tiled)
                op.replace(attention.outputs[0], y)
        else:
            if unpadded is None:
                unpadded = _long_without_padding(model, attention, mask)
            with Ops(model, before=attention) as op:
                then = _branch("tiled", "MultiHeadAttention", [q, k, v], MICROSOFT, tiled)
                other = _branch("masked", "Attention", [q, k, v, mask], "", attributes(attention))
                op.replace(attention.outputs[0], op("If", [unpadded], then_branch=then, else_branch=other))
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
        count += 1
    return count


def integer_gemm(model: ir.Model, heads: int) -> int:
    """Fuse `MatMulInteger`, the cast of its sums and the scale of its columns, which saves two passes over y."""
    count = 0
    for matmul in nodes(model, "MatMulInteger"):
        cast = only_user(matmul.outputs[0], "Cast")
        scaled = cast and only_user(cast.outputs[0], "Mul")
        scale = scaled and array(scaled.inputs[1])
        if scaled is None or scale is None:
            continue
        x, weight, zero = matmul.inputs
        with Ops(model, before=matmul) as op:
            one = op.const(np.float32(1), "one")
            y = op("MatMulIntegerToFloat", [x, weight, one, scaled.inputs[1], zero], MICROSOFT)
            op.replace(scaled.outputs[0], y)
        count += 1
    return count


PASSES: Mapping[str, Callable[[ir.Model, int], int]] = {
    "last_block_for_cls": last_block_for_cls,
    "token_major": token_major,
    "unpad": unpad,
    "tile_attention": tile_attention,
    "integer_gemm": integer_gemm,
}


def _token_major_source(value: ir.Value | None) -> tuple[ir.Value, ir.Node | None] | None:
    """The value [B, T, D] from which an input of Attention [B, H, T, K] was made, and its rotary node."""
    rotary = producer(value, "RotaryEmbedding")
    transpose = producer(rotary.inputs[0] if rotary else value, "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose else None
    source = reshape.inputs[0] if reshape else None
    return None if source is None else (source, rotary)


def _interleaved(rotary: ir.Node) -> dict[str, Any]:
    return {"interleaved": 1} if attributes(rotary).get("interleaved") else {}


def _head_size(model: ir.Model, heads: int) -> int:
    """Width of a head, which is twice the width of the rotary tables."""
    tables = constant(nodes(model, "RotaryEmbedding")[0].inputs[1])
    return 2 * int(tables.shape[-1])


def _long_without_padding(model: ir.Model, before: ir.Node, mask: ir.Value) -> ir.Value:
    """A bool value: whether there are more than TILED_ABOVE tokens and none of them is padding."""
    expand = producer(mask, "Expand")
    if expand is None or expand.inputs[0] is None:
        raise PassError("the attention mask is not expanded from [B, 1, 1, T]; export the bundle again")
    keep = expand.inputs[0]  # [B, 1, 1, T]
    first = next(node for node in model.graph if any(v is mask for v in node.inputs))
    with Ops(model, before=min(first, before, key=list(model.graph).index)) as op:
        least = op("ReduceMin", [op("Cast", [keep], to=ir.DataType.INT32)], keepdims=0)
        tokens = op("Squeeze", [op("Shape", [keep], start=3, end=4)])
        long = op("Greater", [tokens, op.const(np.int64(TILED_ABOVE))])
        return op("And", [op("Cast", [least], to=ir.DataType.BOOL), long])


def _branch(
    name: str, op_type: str, inputs: list[ir.Value | None], domain: str, attributes: Mapping[str, object]
) -> ir.Graph:
    """A subgraph of one node that reads values of the outer graph."""
    node = ir.node(op_type, inputs, dict(attributes), domain=domain)  # type: ignore[arg-type]
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], [node.outputs[0]], nodes=[node], name=name)
