"""Convert an fp32 graph to fp16: `to_fp16`. The graph has explicit types for every value.

float16: the weights and operands of every matrix product, including the patch embedding; the embedding table; the
inputs and outputs of attention.
float32: the addition of bias and residual after a product; the residual stream, LayerNorm, rotary positions, GELU,
SwiGLU's product (which may exceed 65504), softmax, pooling and the L2 norm.
Attention is computed in float32 from operands rounded to float16, with `Cast(f16) -> Cast(f32)` on each side. GPU
compilers fuse this into a float16 kernel with float32 accumulation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from jinaclip_engines.graph import FULL, HALF, Linear, Ops, constant, linears, nodes, patch_product, shape_of

LARGEST = 65504.0  # largest finite float16
# A layer stays in float32 if its input or output on the calibration inputs exceeds LARGEST divided by this factor.
HEADROOM = 4.0


def to_fp16(model: ir.Model, ranges: Mapping[str, np.ndarray], float32_blocks: Collection[str] = ()) -> list[str]:
    """Convert the matrix products of a tower to float16.

    Args:
        model: the standard fp32 graph, modified in place.
        ranges: the largest |x| of each channel, for the input and output of each linear layer, by the value's name.
        float32_blocks: blocks to leave in float32, attention included, for example "blocks.3".

    Returns:
        The layers left in float32: those of the requested blocks, and those whose values or weights are too large for
        float16.
    """
    float32_layers = []
    rounded: dict[str, ir.Value] = {}
    layers = linears(model)
    for layer in layers:
        largest = max(float(ranges[value.name or ""].max()) for value in (layer.x, layer.y))
        largest = max(largest * HEADROOM, float(np.abs(constant(layer.weight)).max()))
        if layer.block in float32_blocks or largest > LARGEST:
            float32_layers.append(layer.name)
            continue
        _replace(model, layer, rounded)
    patches = patch_product(model)
    if patches is not None:
        _replace(model, patches, rounded)
    blocks = dict.fromkeys(layer.block for layer in layers)
    for block, node in zip(blocks, nodes(model, "Attention"), strict=True):
        projections = {f"{block}.{name}" for name in ("qkv", "q", "k", "v")}
        if block not in float32_blocks and projections.isdisjoint(float32_layers):
            _round_attention(model, node)
    for node in nodes(model, "Gather"):
        if len(shape_of(node.inputs[0])) == 2:
            _table(model, node)
    return float32_layers


def _replace(model: ir.Model, layer: Linear, rounded: dict[str, ir.Value]) -> None:
    with Ops(model, before=layer.matmul) as op:
        key = layer.x.name or ""
        if key not in rounded:  # q, k and v share an input, as do gate and up
            rounded[key] = op("Cast", [layer.x], to=HALF)
        weight = op.const(constant(layer.weight).astype(np.float16), f"{layer.name}.fp16")
        y = op("Cast", [op("MatMul", [rounded[key], weight])], to=FULL)
        op.replace(layer.matmul.outputs[0], y)


def _round_attention(model: ir.Model, node: ir.Node) -> None:
    with Ops(model, before=node) as op:
        for index, value in enumerate(node.inputs[:3]):
            node.replace_input_with(index, _rounded(op, value))
    after = list(node.outputs[0].uses())
    with Ops(model, before=after[0].node) as op:
        value = _rounded(op, node.outputs[0])
    for user, index in after:
        user.replace_input_with(index, value)


def _rounded(op: Ops, value: ir.Value | None) -> ir.Value:
    return op("Cast", [op("Cast", [value], to=HALF)], to=FULL)


def _table(model: ir.Model, gather: ir.Node) -> None:
    table, indices = gather.inputs
    assert table is not None
    with Ops(model, before=gather) as op:
        rows = op("Gather", [op.const(constant(table).astype(np.float16), f"{table.name}.fp16"), indices], axis=0)
        op.replace(gather.outputs[0], op("Cast", [rows], to=FULL))
