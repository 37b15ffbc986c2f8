"""Rewrite a tower with the operators of the domain `jinaclip` (runtime/c-library/cuda): `fused_operators`.

An image block has nine nodes: Linear (queries, keys and values), RotaryAttention, LayerNorm, Linear, AddLayerNorm,
Linear (gate and up), SwigluNorm, Linear, AddLayerNorm. The residual stream between blocks is float32. The last block,
which is computed only for the class token, and blocks whose heads are not 64 wide have SplitRotary and Attention
instead of RotaryAttention.
A text block has nine nodes, with SplitRotary and Attention, which `packed_text` replaces by RotaryAttention. Its stream
is the output of a norm, so its values do not grow from block to block, and it is float16.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import (
    FULL,
    HALF,
    JINACLIP,
    Linear,
    Ops,
    array,
    constant,
    producer,
    producers,
    through_casts,
)
from jinaclip_engines.passes.onnxruntime_cuda.blocks import (
    ImageBlock,
    Rotary,
    image_blocks,
    text_blocks,
    unlike,
)
from jinaclip_engines.passes.onnxruntime_cuda.patches import embedded_patches
from jinaclip_engines.passes.onnxruntime_cuda.towers import (
    Delta,
    TextStream,
    epsilon,
    merged,
    write_image,
    write_text,
)

# The width of the SwiGLU layer is padded to a multiple of this: 32 bytes, for which float16 products are fast.
SWIGLU_MULTIPLE = 16
# Number of columns of cos and sin that RotaryAttention supports, half of a head's 64. Other heads use Attention.
ATTENTION_ANGLES = 32


def fused_operators(model: ir.Model, heads: int) -> int:
    """Rewrite the float16 blocks, the embeddings and the L2 norm of a tower with jinaclip's operators.

    Args:
        model: a bundle's fp16 graph after the other passes of `for_cuda`; modified in place.
        heads: attention heads of the tower.

    Returns:
        The number of rewritten blocks.

    Raises:
        PassError: the graph is not a bundle's fp16 graph, or has no block that is completely float16.
    """
    if model.graph.inputs[0].name == "input_ids":
        texts = text_blocks(model)
        found = len(texts) - texts.count(None)
        if found:
            start = None if texts[0] is None else _embeddings(model, texts[0].stream)
            write_text(model, heads, texts, JinaclipOperators(), start)
    else:
        images = image_blocks(model)
        found = len(images) - images.count(None)
        if found:
            patches = None if images[0] is None else embedded_patches(model, images[0].stream)
            write_image(model, heads, images, JinaclipOperators(), patches)
    if not found:
        raise PassError("no block of the graph is completely float16; the operators need a bundle's fp16 graph")
    _unit_vectors(model)
    return found


class JinaclipOperators:
    """A `Writer` that uses jinaclip's operators, one for each step."""

    def norm(self, op: Ops, x: ir.Value, norm: ir.Node, *, half: bool) -> ir.Value:
        return op("LayerNorm", [x, *norm.inputs[1:]], JINACLIP, epsilon=epsilon(norm))

    def add_norm(self, op: Ops, stream: ir.Value, delta: Delta, norm: ir.Node, *, keep: bool) -> Sequence[ir.Value]:
        inputs = [stream, delta[0], *norm.inputs[1:]]
        return op.several("AddLayerNorm", inputs, 2, JINACLIP, epsilon=epsilon(norm), keep_norm=int(keep))

    def text_stream(self, op: Ops, full: ir.Value) -> TextStream:
        half = op("Cast", [full], to=HALF)
        return half, half

    def post_norm(self, op: Ops, stream: TextStream, delta: Delta, norm: ir.Node) -> TextStream:
        half = op("AddPostNorm", [stream[0], delta[0], *norm.inputs[1:]], JINACLIP, epsilon=epsilon(norm))
        return half, half

    def full(self, op: Ops, stream: TextStream) -> ir.Value:
        return op("Cast", [stream[0]], to=FULL)

    def product(self, op: Ops, y: ir.Value, layers: Sequence[Linear], name: str) -> ir.Value:
        return _linear(op, y, *merged(layers), name)

    def delta(self, op: Ops, y: ir.Value, layer: Linear, name: str) -> Delta:
        return self.product(op, y, [layer], name), None

    def split_rotary(self, op: Ops, qkv: ir.Value, rotary: Rotary, heads: int, *, interleaved: int) -> list[ir.Value]:
        inputs = [qkv, rotary.cos, rotary.sin]
        return list(op.several("SplitRotary", inputs, 3, JINACLIP, num_heads=heads, interleaved=interleaved))

    def attention(self, op: Ops, qkv: ir.Value, rotary: Rotary, heads: int) -> ir.Value:
        if constant(rotary.cos).shape[1] != ATTENTION_ANGLES:
            q, k, v = self.split_rotary(op, qkv, rotary, heads, interleaved=1)
            return op("Attention", [q, k, v], q_num_heads=heads, kv_num_heads=heads)
        return rotary_attention(op, [qkv, rotary.cos, rotary.sin], heads, interleaved=1)

    def swiglu(self, op: Ops, y: ir.Value, block: ImageBlock, name: str) -> Delta:
        padding = -constant(block.gate.weight).shape[1] % SWIGLU_MULTIPLE
        y = _linear(op, y, *merged([block.gate, block.up], columns=padding), f"{name}.gate_up")
        y = op("SwigluNorm", [y, *block.ffn_norm.inputs[1:]], JINACLIP, epsilon=epsilon(block.ffn_norm))
        return _linear(op, y, *merged([block.down], rows=padding), f"{name}.down"), None

    def gelu(self, op: Ops, y: ir.Value, layer: Linear, name: str) -> ir.Value:
        return op("Gelu", [self.product(op, y, [layer], name)], JINACLIP)


def rotary_attention(op: Ops, inputs: Sequence[ir.Value | None], heads: int, *, interleaved: int) -> ir.Value:
    """Add a RotaryAttention and return its output [..., D]. Its second output is scratch memory for rotated keys."""
    y, _ = op.several("RotaryAttention", inputs, 2, JINACLIP, num_heads=heads, interleaved=interleaved)
    return y


def _linear(op: Ops, y: ir.Value, weight: np.ndarray, bias: np.ndarray, name: str) -> ir.Value:
    return op("Linear", [y, op.const(weight, f"{name}.weight"), op.const(bias, f"{name}.bias")], JINACLIP)


def _embeddings(model: ir.Model, stream: ir.Value) -> TextStream:
    """Compute the norm of the word and type embeddings in float16, from the float16 table."""
    found = producers(stream, "LayerNormalization", "Add")
    if not found:
        raise unlike("the embedding of tokens")
    norm, add = found
    kind = next((value for value in add.inputs if array(value) is not None), None)
    words = next((through_casts(value) for value in add.inputs if array(value) is None), None)
    rows = producer(words, "Gather")
    if kind is None or words is None or rows is None or rows.inputs[1] is not model.graph.inputs[0]:
        raise unlike("the embedding of tokens")
    writer = JinaclipOperators()
    with Ops(model, before=norm) as op:
        kinds = op.const(constant(kind).astype(np.float32).ravel())
        embedded = writer.post_norm(op, (kinds, kinds), (words, None), norm)
        op.replace(stream, writer.full(op, embedded))
    return embedded


def _unit_vectors(model: ir.Model) -> None:
    """Replace x / max(norm, 1e-12) by one node."""
    raw, unit = model.graph.outputs
    divide = producer(unit, "Div")
    if divide is None or divide.inputs[0] is not raw:
        raise unlike("the L2 norm")
    with Ops(model, before=divide) as op:
        op.replace(unit, op("L2Normalize", [raw], JINACLIP))
