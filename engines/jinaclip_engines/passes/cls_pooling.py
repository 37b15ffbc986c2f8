"""The image tower reads one vector of its last block, the CLS token's: `last_block_for_cls` computes no other."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import Ops, array, attributes, initializer, nodes, producer


def last_block_for_cls(model: ir.Model, heads: int) -> int:
    """The last image block for token 0 alone, the only one that is read: keys and values still come from all.

    Args:
        model: a bundle's graph, in any precision, before other passes; changed.
        heads: as every pass takes them.

    Returns:
        1, or 0 for a text tower, which takes the mean of all tokens.
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
            raise PassError("a Reshape of the last image block has no constant shape; export it again")
        one = np.concatenate([shape[:1], [1], shape[2:]]).astype(np.int64)
        node.replace_input_with(1, initializer(model, one))
    # Where the residual stream comes in again, only its first token is wanted. All in between is by token.
    add, index, stream = _residual_add(attention.outputs[0])
    with Ops(model, before=add) as op:
        sliced = _first_token(op, stream)
    add.replace_input_with(index, sliced)
    return 1


def _queries(value: ir.Value | None) -> tuple[ir.Node, ir.Node, ir.Node]:
    """What makes queries [B, heads, T, K] of [B, T, width]: Reshape, Transpose, and a RotaryEmbedding, which leaves
    token 0 as it is; in a lower precision casts come after them.
    """
    while (cast := producer(value, "Cast")) is not None:
        value = cast.inputs[0]
    rotary = producer(value, "RotaryEmbedding")
    transpose = producer(rotary.inputs[0], "Transpose") if rotary else None
    reshape = producer(transpose.inputs[0], "Reshape") if transpose else None
    if rotary is None or transpose is None or reshape is None:
        raise PassError("the last image block has no RotaryEmbedding before its Attention; export it again")
    cos, sin = array(rotary.inputs[1]), array(rotary.inputs[2])
    if cos is None or sin is None or not (cos[0] == 1).all() or sin[0].any():
        raise PassError("the image tower turns its CLS token by a rotary position; this pass knows none that does")
    return reshape, transpose, rotary


def _merged_heads(attention: ir.Node) -> ir.Node:
    """The Reshape that makes [B, T, width] of what attention returns."""
    node = next(iter(attention.outputs[0].uses())).node
    while node.op_type in ("Cast", "Transpose"):
        node = next(iter(node.outputs[0].uses())).node
    if node.op_type != "Reshape":
        raise PassError("an Attention node is not between the reshapes of a standard graph; export it again")
    return node


def _first_token(op: Ops, value: ir.Value | None) -> ir.Value:
    """[B, T, …] -> [B, 1, …]."""
    return op("Slice", [value, op.const(np.array([0])), op.const(np.array([1])), op.const(np.array([1]))])


def _selects_token_0(gather: ir.Node) -> bool:
    index = array(gather.inputs[1])
    return attributes(gather).get("axis") == 1 and index is not None and index.size == 1 and int(index.item()) == 0


def _residual_add(attended: ir.Value) -> tuple[ir.Node, int, ir.Value]:
    """The Add where the attention's projection meets the residual stream, the index of the stream, and the stream."""
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
