"""A tower over the operators of the domain `jinaclip` (runtime/c-library/cuda): `fused_operators`.

Products and attention read and write float16; every norm's arithmetic and pooling stay float32. A block of a picture is
ten nodes: Linear (queries, keys and values), SplitRotary, Attention, LayerNorm, Linear, AddLayerNorm, Linear (gate and
up), SwigluNorm, Linear, AddLayerNorm; the residual stream between them is float32. A block of a text is nine. What its
residual connections read is the output of a norm, which no sum along the blocks makes large, so it is float16. Blocks
that the bundle keeps in float32 stay as they are; the stream passes through them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from jinaclip_engines.cuda_blocks import (
    ImageBlock,
    TextBlock,
    image_blocks,
    reader,
    text_blocks,
    through_casts,
    unlike,
)
from jinaclip_engines.cuda_patches import embedded_patches
from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import JINACLIP, Linear, Ops, array, attributes, constant, producer

HALF, FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
# Rows of the SwiGLU layer are padded to a multiple of this: 32 bytes, which float16 products are fast with.
SWIGLU_MULTIPLE = 16


def fused_operators(model: ir.Model, heads: int) -> int:
    """Blocks, embeddings and the L2 norm of a tower over the project's own operators.

    Args:
        model: a bundle's fp16 graph after the other passes of `for_cuda`; changed.
        heads: attention heads of the tower.

    Returns:
        The number of blocks.

    Raises:
        PassError: the graph is no fp16 graph of a bundle, or has no block that is float16 throughout.
    """
    is_text = model.graph.inputs[0].name == "input_ids"
    blocks: Sequence[ImageBlock | TextBlock | None] = text_blocks(model) if is_text else image_blocks(model)
    if not any(blocks):
        raise PassError("no block of the graph is float16 throughout; the operators need a bundle's fp16 graph")
    if is_text:
        _text(model, heads, blocks)  # type: ignore[arg-type]
    else:
        _image(model, heads, blocks)  # type: ignore[arg-type]
    _unit_vectors(model)
    return sum(block is not None for block in blocks)


def _image(model: ir.Model, heads: int, blocks: Sequence[ImageBlock | None]) -> None:
    # Between blocks: residual float32 and delta float16, whose sum is the stream, and the value that it replaces.
    pending: tuple[ir.Value, ir.Value, ir.Value] | None = None
    if blocks[0] is not None:
        pending = embedded_patches(model, blocks[0].stream)
    for block in blocks:
        if block is None:
            if pending is not None:
                _end_before(model, reader(pending[2], "LayerNormalization"), pending)
            pending = None
            continue
        with Ops(model, before=block.end) as op:
            if pending is None:
                stream, y = block.stream, layer_norm(op, block.stream, block.norm1)
            else:
                stream, y = add_layer_norm(op, pending[0], pending[1], block.norm1)
            pending = (*_image_block(op, heads, block, stream, y), block.end.outputs[0])
    if pending is not None:
        _final_norm(model, pending)


def _image_block(op: Ops, heads: int, block: ImageBlock, stream: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
    """From the stream and its norm to the stream after attention, and what the MLP adds to it."""
    name = block.down.block
    q, k, v = _split_rotary(op, linear(op, y, block.qkv, f"{name}.qkv"), block.tables, heads, interleaved=1)
    if block.cls_alone:
        zero, one = op.const(np.array([0])), op.const(np.array([1]))
        q, stream = (op("Slice", [value, zero, one, one]) for value in (q, stream))
        stream = op("Squeeze", [stream, one])  # [B, D]
    y = op("Attention", [q, k, v], q_num_heads=heads, kv_num_heads=heads)
    if block.cls_alone:
        y = op("Squeeze", [y, one])
    y = linear(op, layer_norm(op, y, block.inner_norm), [block.out], f"{name}.out")
    stream, y = add_layer_norm(op, stream, y, block.norm2)
    width = constant(block.gate.weight).shape[1]
    padding = -width % SWIGLU_MULTIPLE
    y = linear(op, y, [block.gate, block.up], f"{name}.gate_up", columns=padding)
    y = op("SwigluNorm", [y, *block.ffn_norm.inputs[1:]], JINACLIP, epsilon=_epsilon(block.ffn_norm))
    return stream, linear(op, y, [block.down], f"{name}.down", rows=padding)


def _end_before(model: ir.Model, norm: ir.Node, pending: tuple[ir.Value, ir.Value, ir.Value]) -> None:
    """The stream as one float32 value, before the norm of a block that is not fused."""
    residual, delta, replaced = pending
    with Ops(model, before=norm) as op:
        op.replace(replaced, op("Add", [residual, op("Cast", [delta], to=FULL)]))


def _final_norm(model: ir.Model, pending: tuple[ir.Value, ir.Value, ir.Value]) -> None:
    """The norm behind the last block, for token 0, which is what the tower returns."""
    residual, delta, replaced = pending
    norm = reader(replaced, "LayerNormalization")
    pooled = reader(norm.outputs[0], "Gather")
    if attributes(pooled).get("axis") != 1 or array(pooled.inputs[1]) != 0:
        raise unlike("what reads the last norm")
    with Ops(model, before=norm) as op:
        vectors, _ = add_layer_norm(op, residual, delta, norm, keep_norm=1)
        op.replace(pooled.outputs[0], vectors)


def _text(model: ir.Model, heads: int, blocks: Sequence[TextBlock | None]) -> None:
    # Between blocks: the stream in float16; None behind a block that is not fused.
    stream: ir.Value | None = None
    if blocks[0] is not None:
        stream = _embeddings(model, blocks[0].stream)
    for block in blocks:
        if block is None:
            stream = None
            continue
        with Ops(model, before=block.norm2) as op:
            if stream is None:
                stream = op("Cast", [block.stream], to=HALF)
            stream = _text_block(op, heads, block, stream)
            op.replace(block.norm2.outputs[0], op("Cast", [stream], to=FULL))


def _text_block(op: Ops, heads: int, block: TextBlock, stream: ir.Value) -> ir.Value:
    name = block.out.block
    qkv = linear(op, stream, [block.qkv], f"{name}.qkv")
    q, k, v = _split_rotary(op, qkv, block.tables, heads, interleaved=0)
    lengths = [None, None, None, block.lengths]
    y = op("Attention", [q, k, v, *lengths], q_num_heads=heads, kv_num_heads=heads)
    y = linear(op, y, [block.out], f"{name}.out")
    stream = add_post_norm(op, stream, y, block.norm1)
    y = op("Gelu", [linear(op, stream, [block.fc1], f"{name}.fc1")], JINACLIP)
    return add_post_norm(op, stream, linear(op, y, [block.fc2], f"{name}.fc2"), block.norm2)


def _embeddings(model: ir.Model, stream: ir.Value) -> ir.Value:
    """The float16 norm of word and type embeddings, from the float16 table."""
    norm = stream.producer()
    add = producer(norm.inputs[0], "Add") if norm is not None and norm.op_type == "LayerNormalization" else None
    if norm is None or add is None:
        raise unlike("the embedding of tokens")
    kind = next((value for value in add.inputs if array(value) is not None), None)
    words = next((through_casts(value) for value in add.inputs if array(value) is None), None)
    rows = producer(words, "Gather")
    if kind is None or words is None or rows is None or rows.inputs[1] is not model.graph.inputs[0]:
        raise unlike("the embedding of tokens")
    with Ops(model, before=norm) as op:
        half = add_post_norm(op, op.const(constant(kind).astype(np.float32).ravel()), words, norm)
        op.replace(stream, op("Cast", [half], to=FULL))
    return half


def _unit_vectors(model: ir.Model) -> None:
    """x / max(norm, 1e-12) as one node."""
    raw, unit = model.graph.outputs
    divide = producer(unit, "Div")
    if divide is None or divide.inputs[0] is not raw:
        raise unlike("the L2 norm")
    with Ops(model, before=divide) as op:
        op.replace(unit, op("L2Normalize", [raw], JINACLIP))


def layer_norm(op: Ops, x: ir.Value, norm: ir.Node) -> ir.Value:
    """float16 norm of a float16 or float32 value, with the constants of `norm`."""
    return op("LayerNorm", [x, *norm.inputs[1:]], JINACLIP, epsilon=_epsilon(norm))


def add_layer_norm(
    op: Ops, residual: ir.Value, delta: ir.Value, norm: ir.Node, *, keep_norm: int = 0
) -> tuple[ir.Value, ir.Value]:
    """residual + delta, or with keep_norm its norm, float32; and its norm, float16."""
    inputs = [residual, delta, *norm.inputs[1:]]
    full, half = op.several("AddLayerNorm", inputs, 2, JINACLIP, epsilon=_epsilon(norm), keep_norm=keep_norm)
    return full, half


def add_post_norm(op: Ops, residual: ir.Value, delta: ir.Value, norm: ir.Node) -> ir.Value:
    """The float16 norm of residual + delta; the residual may be one row for all."""
    return op("AddPostNorm", [residual, delta, *norm.inputs[1:]], JINACLIP, epsilon=_epsilon(norm))


def linear(op: Ops, x: ir.Value, layers: Sequence[Linear], name: str, *, rows: int = 0, columns: int = 0) -> ir.Value:
    """Layers that read the same x as one product, side by side.

    Args:
        rows: zeros below the weight, which must be of one layer.
        columns: zeros behind the columns of each layer, in weight and bias.
    """
    weights, biases = [], []
    for layer in layers:
        weight = constant(layer.weight)
        bias = np.zeros(weight.shape[1], np.float16) if layer.bias is None else constant(layer.bias).astype(np.float16)
        weights.append(np.pad(weight, ((0, rows), (0, columns))))
        biases.append(np.pad(bias, (0, columns)))
    merged = op.const(np.concatenate(weights, 1), f"{name}.weight")
    return op("Linear", [x, merged, op.const(np.concatenate(biases), f"{name}.bias")], JINACLIP)


def _split_rotary(
    op: Ops, qkv: ir.Value, tables: tuple[ir.Value, ir.Value], heads: int, *, interleaved: int
) -> Sequence[ir.Value]:
    return op.several("SplitRotary", [qkv, *tables], 3, JINACLIP, num_heads=heads, interleaved=interleaved)


def _epsilon(norm: ir.Node) -> float:
    return float(attributes(norm).get("epsilon", 1e-5))
