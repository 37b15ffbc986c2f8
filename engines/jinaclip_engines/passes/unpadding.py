"""Padding of a batch of texts is computed by attention alone: `unpad` leaves it out of everything else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import Ops, constant, nodes, producer


def unpad(model: ir.Model, heads: int) -> int:
    """Linear layers and norms on the N tokens of a batch that are no padding, [1, N, width]; attention as before.

    Before attention queries, keys and values are put back to their places, [B, T, 3 width], and after it the tokens are
    taken out again, so that texts of unequal length may share a run.

    Args:
        model: after `token_major`; changed.
        heads: as every pass takes them.

    Returns:
        The number of attention nodes; 0 for an image tower, which has no padding.

    Raises:
        PassError: the graph is none that the pass knows.
    """
    ids = next((value for value in model.graph.inputs if value.name == "input_ids"), None)
    if ids is None:
        return 0
    attentions = nodes(model, "Attention")
    embeddings = [node for node in nodes(model, "Gather") if node.inputs[1] is ids]
    mask = producer(attentions[0].inputs[3], "Expand") if len(attentions[0].inputs) > 3 else None
    if not embeddings or mask is None:
        raise PassError("the text graph has no mask, or does not look its tokens up; export it again")
    with Ops(model, before=embeddings[0]) as op:
        every = op.const(np.array([-1]))
        keep = op("Reshape", [mask.inputs[0], every])  # [B T], of [B, 1, 1, T]
        kept = op("NonZero", [keep])  # [1, N]: places of tokens among all
        tokens = op("Gather", [op("Reshape", [ids, every]), kept])
        count = op("CumSum", [op("Cast", [keep], to=ir.DataType.INT64), op.const(np.int64(0))])
        # Of every place its token among the N; of padding any: its values are masked.
        token = op("Max", [op("Sub", [count, op.const(np.int64(1))]), op.const(np.int64(0))])
        token = op("Reshape", [token, op("Shape", [ids])])  # [B, T]
    for node in embeddings:
        node.replace_input_with(1, tokens)
    for attention in attentions:
        _unpad_around(model, attention, kept, token)
    pooled = _pooled(model)
    with Ops(model, before=pooled) as op:
        padded = _padded(op, pooled.inputs[0], token)
    pooled.replace_input_with(0, padded)
    return len(attentions)


def _unpad_around(model: ir.Model, attention: ir.Node, kept: ir.Value, token: ir.Value) -> None:
    """Padding put in before queries, keys and values are parted, and taken out behind the attention."""
    rotary = producer(attention.inputs[0], "RotaryEmbedding")
    split = producer(rotary.inputs[0], "Split") if rotary else None
    if split is None:
        raise PassError("queries, keys and values of a text block are not one product; export the bundle again")
    with Ops(model, before=split) as op:
        padded = _padded(op, split.inputs[0], token)
    split.replace_input_with(0, padded)
    width = constant(nodes(model, "LayerNormalization")[-1].inputs[1]).size
    users = list(attention.outputs[0].uses())
    readers = {use.node for use in users}
    with Ops(model, before=next(node for node in model.graph if node in readers)) as op:
        places = op("Reshape", [attention.outputs[0], op.const(np.array([-1, width]))])
        tokens = op("Gather", [places, kept], axis=0)
    for use in users:
        use.node.replace_input_with(use.idx, tokens)


def _padded(op: Ops, tokens: ir.Value | None, token: ir.Value) -> ir.Value:
    """[1, N, width] -> [B, T, width]."""
    return op("Gather", [op("Squeeze", [tokens, op.const(np.array([0]))]), token], axis=0)


def _pooled(model: ir.Model) -> ir.Node:
    """The product of the last norm and the mask, of which the mean is taken."""
    found = [
        node for node in nodes(model, "Mul")
        if producer(node.inputs[0], "LayerNormalization") and producer(node.inputs[1], "Unsqueeze")
    ]  # fmt: skip
    if len(found) != 1:
        raise PassError("the text graph does not take the mean of its tokens; export the bundle again")
    return found[0]
