"""Remove the padding of a text batch from every operator except attention: `unpad`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import Ops, constant, nodes, producer, producers
from jinaclip_engines.passes.attention import mask_of


def unpad(model: ir.Model, heads: int) -> int:
    """Compute linear layers and norms only for the N tokens of a batch that are not padding, [1, N, width].

    Before attention, queries, keys and values are expanded to [B, T, 3 width]. After it, the N tokens are gathered
    again. Batches of texts of different lengths therefore do not waste computation on padding.

    Args:
        model: a graph after `token_major`; modified in place.
        heads: attention heads of the tower; not used.

    Returns:
        The number of attention nodes; 0 for an image tower, which has no padding.

    Raises:
        PassError: the graph does not have the expected structure.
    """
    ids = next((value for value in model.graph.inputs if value.name == "input_ids"), None)
    if ids is None:
        return 0
    attentions = nodes(model, "Attention")
    norms, mask = nodes(model, "LayerNormalization"), mask_of(attentions[0])
    if not norms or mask is None:
        raise PassError("the text graph has no attention mask or no norm; export the bundle again")
    embeddings = norms[0]
    with Ops(model, before=embeddings) as op:
        every = op.const(np.array([-1]))
        flat = op("Reshape", [mask, every])  # [B T], of [B, 1, 1, T]
        positions = op("NonZero", [flat])  # [1, N]: positions of tokens that are not padding
        rows = op("Reshape", [embeddings.inputs[0], op.const(np.array([-1, _width(embeddings)]))])  # [B T, width]
        tokens = op("Gather", [rows, positions], axis=0)  # [1, N, width]
        count = op("CumSum", [op("Cast", [flat], to=ir.DataType.INT64), op.const(np.int64(0))])
        # Index of each position's token among the N. Padding may get any index, because its values are masked.
        token = op("Max", [op("Sub", [count, op.const(np.int64(1))]), op.const(np.int64(0))])
        token = op("Reshape", [token, op("Shape", [ids])])  # [B, T]
    embeddings.replace_input_with(0, tokens)
    for attention in attentions:
        _unpad_around(model, attention, positions, token)
    pooled = _pooled(model)
    with Ops(model, before=pooled) as op:
        padded = _padded(op, pooled.inputs[0], token)
    pooled.replace_input_with(0, padded)
    return len(attentions)


def _unpad_around(model: ir.Model, attention: ir.Node, positions: ir.Value, token: ir.Value) -> None:
    """Add padding before the split into queries, keys and values, and remove it after the attention."""
    found = producers(attention.inputs[0], "RotaryEmbedding", "Split")
    if not found:
        raise PassError("a text block does not compute q, k and v in one product; export the bundle again")
    split = found[-1]
    with Ops(model, before=split) as op:
        padded = _padded(op, split.inputs[0], token)
    split.replace_input_with(0, padded)
    width = _width(nodes(model, "LayerNormalization")[-1])
    users = list(attention.outputs[0].uses())
    readers = {use.node for use in users}
    with Ops(model, before=next(node for node in model.graph if node in readers)) as op:
        rows = op("Reshape", [attention.outputs[0], op.const(np.array([-1, width]))])  # [B T, width]
        tokens = op("Gather", [rows, positions], axis=0)
    for use in users:
        use.node.replace_input_with(use.idx, tokens)


def _width(norm: ir.Node) -> int:
    return constant(norm.inputs[1]).size


def _padded(op: Ops, tokens: ir.Value | None, token: ir.Value) -> ir.Value:
    """[1, N, width] -> [B, T, width]."""
    return op("Gather", [op("Squeeze", [tokens, op.const(np.array([0]))]), token], axis=0)


def _pooled(model: ir.Model) -> ir.Node:
    """The product of the last norm and the mask, from which the mean is computed."""
    found = [
        node
        for node in nodes(model, "Mul")
        if producer(node.inputs[0], "LayerNormalization") and producer(node.inputs[1], "Unsqueeze")
    ]
    if len(found) != 1:
        raise PassError("the text graph does not compute the mean of its tokens; export the bundle again")
    return found[0]
