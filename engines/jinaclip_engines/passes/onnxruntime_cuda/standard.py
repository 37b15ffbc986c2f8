"""Rewrite a tower with ONNX Runtime's own operators and few casts, if jinaclip's are not available: `fewer_casts`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from jinaclip_engines.graph import FULL, HALF, MICROSOFT, Linear, Ops, constant
from jinaclip_engines.passes.onnxruntime_cuda.blocks import ImageBlock, Rotary, image_blocks, text_blocks
from jinaclip_engines.passes.onnxruntime_cuda.towers import (
    Delta,
    TextStream,
    epsilon,
    merged,
    write_image,
    write_text,
)

# The columns of gate and of up are each padded to a multiple of this, so that the rows of their product are aligned.
COLUMN_MULTIPLE = 8


def fewer_casts(model: ir.Model, heads: int) -> int:
    """Merge products and remove casts in float16 blocks.

    A rewritten block has one product for queries, keys and values and one for gate and up. Biases and rotary positions
    are float16. The residual sum, its bias and its norm are one float32 operator. The product gate · up, which may
    exceed 65504, and its norm stay float32.

    Args:
        model: a bundle's fp16 graph after the other passes of `for_cuda`; modified in place.
        heads: attention heads of the tower.

    Returns:
        The number of rewritten blocks. Blocks that are not completely float16 are not rewritten.
    """
    if model.graph.inputs[0].name == "input_ids":
        texts = text_blocks(model)
        write_text(model, heads, texts, StandardOperators(), None)
        return len(texts) - texts.count(None)
    images = image_blocks(model)
    write_image(model, heads, images, StandardOperators(), None)
    return len(images) - images.count(None)


class StandardOperators:
    """A `Writer` that uses ONNX Runtime's operators."""

    def __init__(self) -> None:
        self._halves: dict[ir.Value, ir.Value] = {}

    def norm(self, op: Ops, x: ir.Value, norm: ir.Node, *, half: bool) -> ir.Value:
        constants = [self._half(op, value) if half else value for value in norm.inputs[1:]]
        y = op("LayerNormalization", [x, *constants], axis=-1, epsilon=epsilon(norm))
        return y if half else op("Cast", [y], to=HALF)

    def add_norm(self, op: Ops, stream: ir.Value, delta: Delta, norm: ir.Node, *, keep: bool) -> Sequence[ir.Value]:
        inputs = [op("Cast", [delta[0]], to=FULL), stream, *norm.inputs[1:], delta[1]]
        found = op.several("SkipLayerNormalization", inputs, 4, MICROSOFT, epsilon=epsilon(norm))
        return found[0] if keep else found[3], op("Cast", [found[0]], to=HALF)

    def text_stream(self, op: Ops, full: ir.Value) -> TextStream:
        return full, op("Cast", [full], to=HALF)

    def post_norm(self, op: Ops, stream: TextStream, delta: Delta, norm: ir.Node) -> TextStream:
        full, half = self.add_norm(op, stream[0], delta, norm, keep=True)
        return full, half

    def full(self, op: Ops, stream: TextStream) -> ir.Value:
        return stream[0]

    def product(self, op: Ops, y: ir.Value, layers: Sequence[Linear], name: str) -> ir.Value:
        return _product(op, y, *merged(layers), name)

    def delta(self, op: Ops, y: ir.Value, layer: Linear, name: str) -> Delta:
        return op("MatMul", [y, layer.weight]), layer.bias

    def split_rotary(self, op: Ops, qkv: ir.Value, rotary: Rotary, heads: int, *, interleaved: int) -> list[ir.Value]:
        tables = [self._half(op, table) for table in (rotary.cos, rotary.sin)]
        q, k, v = op.several("Split", [qkv], 3, axis=-1, num_outputs=3)
        inputs = [*tables, rotary.positions]
        turned = [op("RotaryEmbedding", [x, *inputs], num_heads=heads, interleaved=interleaved) for x in (q, k)]
        return [*turned, v]

    def attention(self, op: Ops, qkv: ir.Value, rotary: Rotary, heads: int) -> ir.Value:
        q, k, v = self.split_rotary(op, qkv, rotary, heads, interleaved=1)
        return op("Attention", [q, k, v], q_num_heads=heads, kv_num_heads=heads)

    def _half(self, op: Ops, value: ir.Value | None) -> ir.Value:
        """A float32 constant as float16."""
        assert value is not None
        if value not in self._halves:
            self._halves[value] = op.const(constant(value).astype(np.float16), f"{value.name}.fp16")
        return self._halves[value]

    def swiglu(self, op: Ops, y: ir.Value, block: ImageBlock, name: str) -> Delta:
        width = constant(block.gate.weight).shape[1]
        padding = -width % COLUMN_MULTIPLE
        y = _product(op, y, *merged([block.gate, block.up], columns=padding), f"{name}.gate_up")
        sizes = np.array([width, padding] * 2 if padding else [width] * 2)
        parts = op.several("Split", [y, op.const(sizes)], len(sizes), axis=-1)
        gate, up = (op("Cast", [part], to=FULL) for part in (parts[0], parts[len(sizes) // 2]))
        y = op("Mul", [op("QuickGelu", [gate], MICROSOFT, alpha=1.0), up])  # QuickGelu with alpha 1 is SiLU
        return self.delta(op, self.norm(op, y, block.ffn_norm, half=False), block.down, f"{name}.down")

    def gelu(self, op: Ops, y: ir.Value, layer: Linear, name: str) -> ir.Value:
        weight, bias = merged([layer])
        y = op("MatMul", [y, op.const(weight, f"{name}.weight")])
        return op("BiasGelu", [y, op.const(bias, f"{name}.bias.fp16")], MICROSOFT)


def _product(op: Ops, y: ir.Value, weight: np.ndarray, bias: np.ndarray, name: str) -> ir.Value:
    y = op("MatMul", [y, op.const(weight, f"{name}.weight")])
    return op("Add", [y, op.const(bias, f"{name}.bias.fp16")])
