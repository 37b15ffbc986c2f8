"""Rewrite the float16 blocks of a tower for the CUDA provider, with a set of operators given by a `Writer`.

Products and attention read and write float16. Norms are computed in float32. Blocks that are float32 in the bundle are
not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from jinaclip_engines.graph import FULL, Linear, Ops, array, attributes, constant
from jinaclip_engines.passes.onnxruntime_cuda.blocks import ImageBlock, Rotary, TextBlock, reader, unlike

# A value to be added to the stream: the float16 output of a product, and a float32 bias not yet added, or None.
Delta = tuple[ir.Value, ir.Value | None]
# A stream as a sum that is not yet computed: residual float32, delta, and the value of the graph that the sum replaces.
Pending = tuple[ir.Value, Delta, ir.Value]
# The stream of a text tower: the value that block outputs are added to, float32 or float16, and the same in float16.
TextStream = tuple[ir.Value, ir.Value]


class Writer(Protocol):
    """A set of operators that a tower is written with.

    Values called y are float16, streams are float32. A norm is the original LayerNormalization node, whose constants
    are used.
    """

    def norm(self, op: Ops, x: ir.Value, norm: ir.Node, *, half: bool) -> ir.Value:
        """The norm of a float32 value, or of a float16 value if `half` -> float16."""

    def add_norm(self, op: Ops, stream: ir.Value, delta: Delta, norm: ir.Node, *, keep: bool) -> Sequence[ir.Value]:
        """Add delta to the stream. Returns the sum (its norm if `keep`), float32, and the norm of the sum, float16."""

    def text_stream(self, op: Ops, full: ir.Value) -> TextStream:
        """Make a text tower's stream from a float32 value."""

    def post_norm(self, op: Ops, stream: TextStream, delta: Delta, norm: ir.Node) -> TextStream:
        """Add delta to a text tower's stream and return the norm of the sum."""

    def full(self, op: Ops, stream: TextStream) -> ir.Value:
        """A text tower's stream as a float32 value."""

    def product(self, op: Ops, y: ir.Value, layers: Sequence[Linear], name: str) -> ir.Value:
        """One product for several layers that read the same y; outputs are concatenated -> float16."""

    def delta(self, op: Ops, y: ir.Value, layer: Linear, name: str) -> Delta:
        """The output of a layer, to be added to the stream."""

    def split_rotary(self, op: Ops, qkv: ir.Value, rotary: Rotary, heads: int, *, interleaved: int) -> list[ir.Value]:
        """Queries and keys after rotary embedding, and values -> float16."""

    def attention(self, op: Ops, qkv: ir.Value, rotary: Rotary, heads: int) -> ir.Value:
        """Self-attention of an image's tokens, with interleaved rotary positions -> float16 [B, T, D]."""

    def swiglu(self, op: Ops, y: ir.Value, block: ImageBlock, name: str) -> Delta:
        """down(ffn_norm(silu(gate(y)) · up(y))). The product may exceed 65504."""

    def gelu(self, op: Ops, y: ir.Value, layer: Linear, name: str) -> ir.Value:
        """gelu(layer(y)) -> float16."""


def write_image(
    model: ir.Model, heads: int, blocks: Sequence[ImageBlock | None], writer: Writer, start: Pending | None
) -> None:
    """Rewrite the blocks of the image tower that are not None.

    Args:
        model: the graph; modified in place.
        heads: attention heads of the tower.
        blocks: the blocks in order; None for a block that is not rewritten.
        writer: the set of operators.
        start: input of the first block, if that block is rewritten and its input too.
    """
    pending = start
    for block in blocks:
        if block is None:
            if pending is not None:
                _end_before(model, reader(pending[2], "LayerNormalization"), pending)
            pending = None
            continue
        with Ops(model, before=block.end) as op:
            if pending is None:
                stream, y = block.stream, writer.norm(op, block.stream, block.norm1, half=False)
            else:
                stream, y = writer.add_norm(op, pending[0], pending[1], block.norm1, keep=False)
            stream, delta = _image_block(op, heads, block, writer, stream, y)
            pending = (stream, delta, block.end.outputs[0])
    if pending is not None:
        _final_norm(model, writer, pending)


def _image_block(
    op: Ops, heads: int, block: ImageBlock, writer: Writer, stream: ir.Value, y: ir.Value
) -> tuple[ir.Value, Delta]:
    """Write one block, given the stream and its norm. Returns the stream after attention and the MLP's delta."""
    name = block.down.block
    qkv = writer.product(op, y, block.qkv, f"{name}.qkv")
    if block.cls_alone:
        q, k, v = writer.split_rotary(op, qkv, block.rotary, heads, interleaved=1)
        zero, one = op.const(np.array([0])), op.const(np.array([1]))
        q, stream = (op("Slice", [value, zero, one, one]) for value in (q, stream))
        y = op("Attention", [q, k, v], q_num_heads=heads, kv_num_heads=heads)
        y, stream = (op("Squeeze", [value, one]) for value in (y, stream))  # [B, D]
    else:
        y = writer.attention(op, qkv, block.rotary, heads)
    delta = writer.delta(op, writer.norm(op, y, block.inner_norm, half=True), block.out, f"{name}.out")
    stream, y = writer.add_norm(op, stream, delta, block.norm2, keep=False)
    return stream, writer.swiglu(op, y, block, name)


def _end_before(model: ir.Model, norm: ir.Node, pending: Pending) -> None:
    """Compute the stream as one float32 value, before the norm of a block that is not rewritten."""
    stream, (delta, bias), replaced = pending
    with Ops(model, before=norm) as op:
        full = op("Cast", [delta], to=FULL)
        full = full if bias is None else op("Add", [full, bias])
        op.replace(replaced, op("Add", [stream, full]))


def _final_norm(model: ir.Model, writer: Writer, pending: Pending) -> None:
    """Write the norm after the last block, only for token 0, which is the tower's output."""
    stream, delta, replaced = pending
    norm = reader(replaced, "LayerNormalization")
    pooled = reader(norm.outputs[0], "Gather")
    if attributes(pooled).get("axis") != 1 or array(pooled.inputs[1]) != 0:
        raise unlike("the reader of the last norm")
    with Ops(model, before=norm) as op:
        vectors, _ = writer.add_norm(op, stream, delta, norm, keep=True)
        op.replace(pooled.outputs[0], vectors)


def write_text(
    model: ir.Model, heads: int, blocks: Sequence[TextBlock | None], writer: Writer, start: TextStream | None
) -> None:
    """Rewrite the blocks of the text tower that are not None.

    Args:
        model: the graph; modified in place.
        heads: attention heads of the tower.
        blocks: the blocks in order; None for a block that is not rewritten.
        writer: the set of operators.
        start: input of the first block, if that block is rewritten and its input too.
    """
    stream = start
    for block in blocks:
        if block is None:
            stream = None
            continue
        with Ops(model, before=block.norm2) as op:
            if stream is None:
                stream = writer.text_stream(op, block.stream)
            stream = _text_block(op, heads, block, writer, stream)
            op.replace(block.norm2.outputs[0], writer.full(op, stream))


def _text_block(op: Ops, heads: int, block: TextBlock, writer: Writer, stream: TextStream) -> TextStream:
    name = block.out.block
    qkv = writer.product(op, stream[1], [block.qkv], f"{name}.qkv")
    q, k, v = writer.split_rotary(op, qkv, block.rotary, heads, interleaved=0)
    lengths = [None, None, None, block.lengths]
    y = op("Attention", [q, k, v, *lengths], q_num_heads=heads, kv_num_heads=heads)
    stream = writer.post_norm(op, stream, writer.delta(op, y, block.out, f"{name}.out"), block.norm1)
    y = writer.gelu(op, stream[1], block.fc1, f"{name}.fc1")
    return writer.post_norm(op, stream, writer.delta(op, y, block.fc2, f"{name}.fc2"), block.norm2)


def merged(layers: Sequence[Linear], *, rows: int = 0, columns: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated weights and biases of layers, float16.

    Args:
        layers: layers with the same input.
        rows: number of zero rows to append to the weight.
        columns: number of zero columns to append to the columns of each layer.
    """
    weights, biases = [], []
    for layer in layers:
        weights.append(np.pad(constant(layer.weight), ((0, rows), (0, columns))))
        biases.append(np.pad(layer.bias_values().astype(np.float16), (0, columns)))
    return np.concatenate(weights, 1), np.concatenate(biases)


def epsilon(norm: ir.Node) -> float:
    return float(attributes(norm).get("epsilon", 1e-5))
