"""Compute the last image block only for the CLS token, the only one whose output is used: `last_block_for_cls`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import Ops, array, attributes, initializer, nodes, producers, through_casts


def last_block_for_cls(model: ir.Model, heads: int) -> int:
    """Compute the last image block only for token 0, whose output is the only one used. Keys and values use all tokens.

    Args:
        model: a bundle's graph, in any precision, before other passes; modified in place.
        heads: attention heads of the tower; not used.

    Returns:
        1, or 0 for a text tower, which uses the mean of all tokens.

    Raises:
        PassError: the last block does not have the expected structure.
    """
    pooled = [node for node in nodes(model, "Gather") if _selects_token_0(node)]
    if len(pooled) != 1:
        return 0
    attention = nodes(model, "Attention")[-1]
    reshape, transpose, rotary = _queries(attention.inputs[0])
    with Ops(model, before=reshape) as op:
        first = _first_token(op, reshape.inputs[0])
    reshape.replace_input_with(0, first)
    ir.convenience.replace_all_uses_with(rotary.outputs[0], transpose.outputs[0])
    for node in (reshape, _merged_heads(attention)):
        shape = array(node.inputs[1])  # [B, tokens, …]
        if shape is None or len(shape) < 3:
            raise PassError("a Reshape of the last image block has no constant shape; export the bundle again")
        one = np.concatenate([shape[:1], [1], shape[2:]]).astype(np.int64)
        node.replace_input_with(1, initializer(model, one))
    # At the residual addition only the first token is needed. Everything in between works on each token separately.
    add, index, stream = _residual_add(attention.outputs[0])
    with Ops(model, before=add) as op:
        sliced = _first_token(op, stream)
    add.replace_input_with(index, sliced)
    return 1


def _queries(value: ir.Value | None) -> tuple[ir.Node, ir.Node, ir.Node]:
    """The nodes that compute queries [B, heads, T, K] from [B, T, width]: Reshape, Transpose and RotaryEmbedding. The
    RotaryEmbedding does not change token 0. In lower precisions, casts after these nodes are skipped.
    """
    found = producers(through_casts(value), "RotaryEmbedding", "Transpose", "Reshape")
    if not found:
        raise PassError("the last image block has no RotaryEmbedding before its Attention; export the bundle again")
    rotary, transpose, reshape = found
    cos, sin = array(rotary.inputs[1]), array(rotary.inputs[2])
    if cos is None or sin is None or not (cos[0] == 1).all() or sin[0].any():
        raise PassError("the image tower applies a rotary position to its CLS token, which this pass does not support")
    return reshape, transpose, rotary


def _merged_heads(attention: ir.Node) -> ir.Node:
    """The Reshape of the attention's output to [B, T, width]."""
    node = next(iter(attention.outputs[0].uses())).node
    while node.op_type in ("Cast", "Transpose"):
        node = next(iter(node.outputs[0].uses())).node
    if node.op_type != "Reshape":
        raise PassError("an Attention node is not between a standard graph's reshapes; export the bundle again")
    return node


def _first_token(op: Ops, value: ir.Value | None) -> ir.Value:
    """[B, T, …] -> [B, 1, …]."""
    return op("Slice", [value, op.const(np.array([0])), op.const(np.array([1])), op.const(np.array([1]))])


def _selects_token_0(gather: ir.Node) -> bool:
    index = array(gather.inputs[1])
    return attributes(gather).get("axis") == 1 and index is not None and index.size == 1 and int(index.item()) == 0


def _residual_add(attended: ir.Value) -> tuple[ir.Node, int, ir.Value]:
    """The Add of the attention's projection to the residual stream, the stream's input index, and the stream."""
    reached = {attended}
    value = attended
    while True:
        user = next(iter(value.uses())).node
        if user.op_type == "Add":
            for index, other in enumerate(user.inputs):
                if other is not None and array(other) is None and not _depends(other, reached):
                    return user, index, other
        reached.update(user.outputs)
        value = user.outputs[0]


def _depends(value: ir.Value, on: set[ir.Value]) -> bool:
    """Whether `value` is computed from one of `on`."""
    stack, seen = [value], set()
    while stack:
        current = stack.pop()
        if current in on:
            return True
        node = current.producer()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(v for v in node.inputs if v is not None)
    return False
