"""The float16 blocks of a tower written anew for the CUDA provider, over one set of operators or another: `Writer`.

Products and attention read and write float16; every norm's arithmetic stays float32. Blocks that the bundle keeps in
float32 stay as they are; the stream passes through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from jinaclip_engines.graph import Linear, Ops, array, attributes, constant
from jinaclip_engines.passes.onnxruntime_cuda.blocks import ImageBlock, Rotary, TextBlock, reader, unlike

HALF, FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
# What is added to the stream: float16 as a product returns it, and a float32 bias that is still to be added, or None.
Delta = tuple[ir.Value, ir.Value | None]
# A stream as a sum: residual float32 and what is added, and the value of the graph that the sum replaces.
Pending = tuple[ir.Value, Delta, ir.Value]
# A text's stream: what a block's outputs are added to, float32 or float16, and the same in float16.
TextStream = tuple[ir.Value, ir.Value]


class Writer(Protocol):
    """A set of operators. float16 is y, float32 the stream; a norm is a node whose constants are taken."""

    def norm(self, op: Ops, x: ir.Value, norm: ir.Node, *, half: bool) -> ir.Value:
        """The norm of a float32 value, or with `half` of a float16 one -> float16."""

    def add_norm(self, op: Ops, stream: ir.Value, delta: Delta, norm: ir.Node, *, keep: bool) -> Sequence[ir.Value]:
        """The stream with delta added, or with `keep` its norm, float32; and its norm, float16."""

    def text_stream(self, op: Ops, full: ir.Value) -> TextStream:
        """A stream from a float32 value."""

    def post_norm(self, op: Ops, stream: TextStream, delta: Delta, norm: ir.Node) -> TextStream:
        """The norm of a text's stream with delta added."""

    def full(self, op: Ops, stream: TextStream) -> ir.Value:
        """A text's stream as a float32 value."""

    def product(self, op: Ops, y: ir.Value, layers: Sequence[Linear], name: str) -> ir.Value:
        """Layers that read the same y, side by side -> float16."""

    def delta(self, op: Ops, y: ir.Value, layer: Linear, name: str) -> Delta:
        """A layer whose output is added to the stream."""

    def split_rotary(self, op: Ops, qkv: ir.Value, rotary: Rotary, heads: int, *, interleaved: int) -> list[ir.Value]:
        """Queries and keys, turned, and values -> float16."""

    def attention(self, op: Ops, qkv: ir.Value, rotary: Rotary, heads: int) -> ir.Value:
        """Self-attention of an image's tokens, with interleaved rotary positions -> float16 [B, T, D]."""

    def swiglu(self, op: Ops, y: ir.Value, block: ImageBlock, name: str) -> Delta:
        """down(ffn_norm(silu(gate(y)) · up(y))), whose product may pass 65504."""

    def gelu(self, op: Ops, y: ir.Value, layer: Linear, name: str) -> ir.Value:
        """gelu(layer(y)) -> float16."""


def write_image(
    model: ir.Model, heads: int, blocks: Sequence[ImageBlock | None], writer: Writer, start: Pending | None
) -> None:
    """Write the blocks of the image tower that are not None.

    Args:
        start: what goes into the first block, if it is written anew.
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
    """From the stream and its norm to the stream after attention, and what the MLP adds to it."""
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
    """The stream as one float32 value, before the norm of a block that is not written anew."""
    stream, (delta, bias), replaced = pending
    with Ops(model, before=norm) as op:
        full = op("Cast", [delta], to=FULL)
        full = full if bias is None else op("Add", [full, bias])
        op.replace(replaced, op("Add", [stream, full]))


def _final_norm(model: ir.Model, writer: Writer, pending: Pending) -> None:
    """The norm behind the last block, for token 0, which is what the tower returns."""
    stream, delta, replaced = pending
    norm = reader(replaced, "LayerNormalization")
    pooled = reader(norm.outputs[0], "Gather")
    if attributes(pooled).get("axis") != 1 or array(pooled.inputs[1]) != 0:
        raise unlike("what reads the last norm")
    with Ops(model, before=norm) as op:
        vectors, _ = writer.add_norm(op, stream, delta, norm, keep=True)
        op.replace(pooled.outputs[0], vectors)


def write_text(
    model: ir.Model, heads: int, blocks: Sequence[TextBlock | None], writer: Writer, start: TextStream | None
) -> None:
    """Write the blocks of the text tower that are not None.

    Args:
        start: what goes into the first block, if that is written anew.
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
    """Weight and bias float16 of layers side by side.

    Args:
        rows: of zeros below the weight.
        columns: of zeros behind the columns of each layer.
    """
    weights, biases = [], []
    for layer in layers:
        weight = constant(layer.weight)
        bias = np.zeros(weight.shape[1], np.float16) if layer.bias is None else constant(layer.bias).astype(np.float16)
        weights.append(np.pad(weight, ((0, rows), (0, columns))))
        biases.append(np.pad(bias, (0, columns)))
    return np.concatenate(weights, 1), np.concatenate(biases)


def epsilon(norm: ir.Node) -> float:
    return float(attributes(norm).get("epsilon", 1e-5))
