"""Text without padding: `packed_text`."""

from __future__ import annotations

import onnx_ir as ir

from jinaclip.packed_texts import IDS, OFFSETS, POSITIONS, TOKEN_OFFSET
from jinaclip_engines.cuda_blocks import unlike
from jinaclip_engines.cuda_operators import rotary_attention
from jinaclip_engines.graph import JINACLIP, Ops, nodes, producer, tidy


def packed_text(model: ir.Model, heads: int) -> int:
    """All texts of a batch as one row of tokens, for all operators.

    The inputs become: input_ids int64 [N]; positions int32 [N], of each token in its text; offsets int32 [B + 1], where
    each text begins, and N; token_offset int32 [B, S], S tokens in the longest text, of which only the shape is read.

    Args:
        model: after `fused_operators`; changed.
        heads: attention heads of the tower.

    Returns:
        The number of attention nodes; 0 for images, and for a text graph with a block that is not fused: it keeps
        input_ids [B, T] with padding.
    """
    ids = model.graph.inputs[0]
    if ids.name != IDS or nodes(model, "RotaryEmbedding"):
        return 0
    raw = model.graph.outputs[0]
    mean = producer(raw, "Div")
    total = producer(mean.inputs[0], "ReduceSum") if mean else None
    masked = producer(total.inputs[0], "Mul") if total else None
    if mean is None or masked is None:
        raise unlike("the mean of the tokens")
    ids.shape = ir.Shape(["tokens"])
    positions = _input(model, POSITIONS, ["tokens"])
    offsets = _input(model, OFFSETS, ["offsets"])
    token_offset = _input(model, TOKEN_OFFSET, ["batch", "longest"])
    attentions = nodes(model, "Attention")
    for node in attentions:
        split = producer(node.inputs[0], "SplitRotary")
        if split is None:
            raise unlike("an attention")
        with Ops(model, before=node) as op:
            inputs = [*split.inputs[:3], positions, offsets, token_offset]
            op.replace(node.outputs[0], rotary_attention(op, inputs, heads, interleaved=0))
    cast = producer(masked.inputs[0], "Cast")
    with Ops(model, before=mean) as op:
        op.replace(raw, op("MeanPool", [cast.inputs[0] if cast else masked.inputs[0], offsets], JINACLIP))
    tidy(model)
    return len(attentions)


def _input(model: ir.Model, name: str, shape: list[str]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT32))
    model.graph.inputs.append(value)
    return value
