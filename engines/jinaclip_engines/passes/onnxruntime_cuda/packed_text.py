"""Text without padding: `packed_text`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jinaclip.backends.onnxruntime.packed_texts import IDS, OFFSETS, POSITIONS, TOKEN_OFFSET
from jinaclip_engines.graph import JINACLIP, MICROSOFT, Ops, constant, nodes, producer, producers, tidy
from jinaclip_engines.passes.onnxruntime_cuda.blocks import unlike
from jinaclip_engines.passes.onnxruntime_cuda.operators import ATTENTION_ANGLES, rotary_attention


def packed_text(model: ir.Model, heads: int) -> int:
    """Change a text graph to take all texts of a batch as one sequence of tokens, without padding.

    The inputs become: input_ids int64 [N]; positions int32 [N], the position of each token in its text; offsets int32
    [B + 1], the start of each text and the end of the last; token_offset int32 [B, S], of which only the shape is read
    (S is the number of tokens of the longest text).

    Args:
        model: a graph after `fused_operators` or `fewer_casts`; modified in place.
        heads: attention heads of the tower.

    Returns:
        The number of attention nodes. 0 if the graph was not changed: it is an image graph, it has a block that is not
        completely float16, or, after `fused_operators`, its heads are not 64 wide.
    """
    ids = model.graph.inputs[0]
    attentions = nodes(model, "Attention")
    if ids.name != IDS or any("q_num_heads" not in node.attributes for node in attentions):
        return 0
    splits = [split for node in attentions if (split := producer(node.inputs[0], "SplitRotary"))]
    mixed = 0 < len(splits) < len(attentions)
    if mixed or any(constant(split.inputs[1]).shape[1] != ATTENTION_ANGLES for split in splits):
        return 0
    raw = model.graph.outputs[0]
    found = producers(raw, "Div", "ReduceSum", "Mul")
    if not found:
        raise unlike("the mean of the tokens")
    mean, _, masked = found
    ids.shape = ir.Shape(["tokens"])
    positions = _input(model, POSITIONS, ["tokens"])
    offsets = _input(model, OFFSETS, ["offsets"])
    token_offset = _input(model, TOKEN_OFFSET, ["batch", "longest"])
    if not splits:
        _as_rows_of_one(model, ids, positions)
    for index, node in enumerate(attentions):
        with Ops(model, before=node) as op:
            if splits:
                inputs = [*splits[index].inputs[:3], positions, offsets, token_offset]
                y = rotary_attention(op, inputs, heads, interleaved=0)
            else:
                y = _packed_attention(op, node, token_offset, offsets, heads)
            op.replace(node.outputs[0], y)
    with Ops(model, before=mean) as op:
        if splits:
            cast = producer(masked.inputs[0], "Cast")
            means = op("MeanPool", [cast.inputs[0] if cast else masked.inputs[0], offsets], JINACLIP)
        else:
            means = _means(op, masked.inputs[0], ids, offsets)
        op.replace(raw, means)
    tidy(model)
    return len(attentions)


def _packed_attention(op: Ops, node: ir.Node, token_offset: ir.Value, offsets: ir.Value, heads: int) -> ir.Value:
    """Replace an Attention over [N, 1, D] by PackedMultiHeadAttention."""
    one = op.const(np.array([1]))
    parts = [op("Squeeze", [value, one]) for value in node.inputs[:3]]
    y = op("PackedMultiHeadAttention", [*parts, None, token_offset, offsets], MICROSOFT, num_heads=heads)
    return op("Unsqueeze", [y, one])


def _as_rows_of_one(model: ir.Model, ids: ir.Value, positions: ir.Value) -> None:
    """Reshape ids and positions to [N, 1] for operators that take [B, T]. RotaryEmbedding rejects rows with more tokens
    than its tables have positions, so all tokens cannot be one row.
    """
    readers, rotated = list(ids.uses()), nodes(model, "RotaryEmbedding")
    with Ops(model, before=next(iter(model.graph))) as op:
        one = op.const(np.array([1]))
        column = op("Unsqueeze", [ids, one])
        counted = op("Unsqueeze", [op("Cast", [positions], to=ir.DataType.INT64), one])
    for use in readers:
        use.node.replace_input_with(use.idx, column)
    for node in rotated:
        node.replace_input_with(3, counted)


def _means(op: Ops, x: ir.Value | None, ids: ir.Value, offsets: ir.Value) -> ir.Value:
    """x [N, 1, D] float32 -> [B, D]: the mean of each text.

    It is a product with a matrix [B, N] that has 1 / length where a token belongs to the text, and 0 elsewhere. Rows
    after the last text are ignored. NaN or infinity in one text does not affect the others.
    """
    first, one = op.const(np.array([0])), op.const(np.array([1]))
    zero, end = op.const(np.float32(0)), op.const(np.array([np.iinfo(np.int64).max]))
    begins = op("Slice", [offsets, first, op.const(np.array([-1]))])
    ends = op("Slice", [offsets, one, end])
    last = op("Slice", [offsets, op.const(np.array([-1])), end])
    count = op("Cast", [op("Squeeze", [op("Shape", [ids]), first])], to=ir.DataType.INT32)
    rows = op("Range", [op.const(np.int32(0)), count, op.const(np.int32(1))])
    row, column = op("Unsqueeze", [rows, first]), op("Unsqueeze", [rows, one])
    from_begin = op("GreaterOrEqual", [row, op("Unsqueeze", [begins, one])])
    inside = op("And", [from_begin, op("Less", [row, op("Unsqueeze", [ends, one])])])
    lengths = op("Cast", [op("Sub", [ends, begins])], to=ir.DataType.FLOAT)
    weights = op("Div", [op("Cast", [inside], to=ir.DataType.FLOAT), op("Unsqueeze", [lengths, one])])
    values = op("Squeeze", [x, one])
    difference = op("Sub", [values, values])  # 0, or NaN where a value is not finite
    counts = op("And", [op("Equal", [difference, zero]), op("Less", [column, last])])
    means = op("MatMul", [weights, op("Where", [counts, values, zero])])
    finite = op("Equal", [op("ReduceSum", [difference, one], keepdims=1), zero])  # of each row
    spoiled = op("MatMul", [weights, op("Where", [finite, zero, op.const(np.float32(1))])])
    return op("Add", [means, op("Where", [op("Greater", [spoiled, zero]), op.const(np.float32(np.nan)), zero])])


def _input(model: ir.Model, name: str, shape: list[str]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT32))
    model.graph.inputs.append(value)
    return value
