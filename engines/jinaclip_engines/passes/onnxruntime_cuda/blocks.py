"""Find the blocks of a bundle's fp16 graph for the CUDA passes: `image_blocks`, `text_blocks`.

The graph must have passed `last_block_for_cls` and `flash_attention`. Every value of a block is checked, and a graph of
another structure raises PassError. Casts between float16 and float32 are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import (
    Linear,
    array,
    attributes,
    constant,
    linears,
    nodes,
    producer,
    producers,
    through_casts,
)
from jinaclip_engines.precision.fp16 import LARGEST


@dataclass(frozen=True)
class Rotary:
    """cos and sin float32 [P, K/2], and positions 0 to T - 1 in every row, int64 [B, T]."""

    cos: ir.Value
    sin: ir.Value
    positions: ir.Value


@dataclass(frozen=True)
class ImageBlock:
    """Pre-norm: stream + out(inner_norm(attention(qkv(norm1(stream))))), then + down(ffn_norm(silu(gate) · up)).

    Attributes:
        stream: input of the block, the residual stream, float32 [B, T, D].
        qkv: layers of queries, keys and values.
        rotary: rotary positions of every token, interleaved.
        end: the Add that returns the stream.
        cls_alone: whether the block is computed only for token 0 and returns [B, 1, D].
    """

    stream: ir.Value
    norm1: ir.Node
    qkv: tuple[Linear, Linear, Linear]
    rotary: Rotary
    inner_norm: ir.Node
    out: Linear
    norm2: ir.Node
    gate: Linear
    up: Linear
    ffn_norm: ir.Node
    down: Linear
    end: ir.Node
    cls_alone: bool


@dataclass(frozen=True)
class TextBlock:
    """Post-norm: x = norm1(x + out(attention(qkv(x)))), then norm2(x + fc2(gelu(fc1(x)))).

    Attributes:
        stream: input of the block, float32 [B, T, D].
        rotary: rotary positions of every token, not interleaved.
        lengths: number of tokens of each row that are not padding, int64 [B].
    """

    stream: ir.Value
    qkv: Linear
    rotary: Rotary
    lengths: ir.Value
    out: Linear
    norm1: ir.Node
    fc1: Linear
    fc2: Linear
    norm2: ir.Node


def image_blocks(model: ir.Model) -> list[ImageBlock | None]:
    """The blocks in order; None for a block that is not completely float16."""
    return [None if parts is None else _image_block(*parts) for parts in _halves(model)]


def text_blocks(model: ir.Model) -> list[TextBlock | None]:
    """The blocks in order; None for a block that is not completely float16."""
    return [None if parts is None else _text_block(*parts) for parts in _halves(model)]


def unlike(what: str) -> PassError:
    return PassError(f"{what} does not match a bundle's fp16 graph; export the bundle again")


def norm_of(value: ir.Value | None) -> ir.Node:
    """The LayerNormalization over the last axis that computes `value`. Casts after it are skipped."""
    node = producer(through_casts(value), "LayerNormalization")
    if node is None or len(node.inputs) != 3 or attributes(node).get("axis", -1) not in (-1, 2):
        raise unlike("an operand of a product")
    return node


def reader(value: ir.Value, op_type: str) -> ir.Node:
    """The first node of the operator `op_type` that reads `value`."""
    for use in value.uses():
        if use.node.op_type == op_type:
            return use.node
    raise unlike(f"the reader of {value.name}")


Parts = tuple[str, Mapping[str, Linear], ir.Node]


def _halves(model: ir.Model) -> list[Parts | None]:
    """For each block its name, its layers by short name and its Attention; None if the block is not all float16."""
    blocks: dict[str, dict[str, Linear]] = {}
    for layer in linears(model):
        blocks.setdefault(layer.block, {})[layer.name.rpartition(".")[2]] = layer
    attentions = nodes(model, "Attention")
    if len(blocks) != len(attentions):
        raise unlike(f"a graph of {len(blocks)} blocks and {len(attentions)} Attention nodes")
    found: list[Parts | None] = []
    for (name, layers), attention in zip(blocks.items(), attentions, strict=True):
        flat = "q_num_heads" in attention.attributes  # `flash_attention` sets it for float16 operands
        half = flat and all(layer.cast is not None and _bias_fits(layer) for layer in layers.values())
        found.append((name, layers, attention) if half else None)
    return found


def _bias_fits(layer: Linear) -> bool:
    return layer.bias is None or float(np.abs(constant(layer.bias)).max()) <= LARGEST


def _image_block(name: str, layers: Mapping[str, Linear], attention: ir.Node) -> ImageBlock:
    if layers.keys() != {"q", "k", "v", "out", "gate", "up", "down"}:
        raise unlike(name)
    q, k, v = (layers[part] for part in "qkv")
    norm1 = norm_of(q.x)
    stream = norm1.inputs[0]
    queries, keys, values = (through_casts(value) for value in attention.inputs[:3])
    rotary = producer(keys, "RotaryEmbedding")
    turned = producer(queries, "RotaryEmbedding")
    first = producer(queries, "Slice")
    source = turned.inputs[0] if turned else first.inputs[0] if first else None
    if rotary is None or stream is None or (source, rotary.inputs[0], values) != (q.y, k.y, v.y):
        raise unlike(f"the attention of {name}")
    if not attributes(rotary).get("interleaved") or len({layer.x for layer in (q, k, v)}) != 1:
        raise unlike(f"the attention of {name}")
    inner_norm = norm_of(layers["out"].x)
    if through_casts(inner_norm.inputs[0]) is not attention.outputs[0]:
        raise unlike(f"the inner norm of {name}")
    middle, beside = _residual(layers["out"])
    if first is not None:
        cut = producer(beside, "Slice")
        beside = cut.inputs[0] if cut is not None else None
    gate, up, down = (layers[part] for part in ("gate", "up", "down"))
    norm2 = norm_of(gate.x)
    ffn_norm = norm_of(down.x)
    if beside is not stream or norm2.inputs[0] is not middle.outputs[0] or up.x is not gate.x:
        raise unlike(name)
    if not _is_swiglu(ffn_norm.inputs[0], gate, up):
        raise unlike(f"the SwiGLU of {name}")
    end, beside = _residual(down)
    if beside is not middle.outputs[0]:
        raise unlike(name)
    return ImageBlock(
        stream=stream,
        norm1=norm1,
        qkv=(q, k, v),
        rotary=_rotary(rotary),
        inner_norm=inner_norm,
        out=layers["out"],
        norm2=norm2,
        gate=gate,
        up=up,
        ffn_norm=ffn_norm,
        down=down,
        end=end,
        cls_alone=first is not None,
    )


def _text_block(name: str, layers: Mapping[str, Linear], attention: ir.Node) -> TextBlock:
    if layers.keys() != {"qkv", "out", "fc1", "fc2"}:
        raise unlike(name)
    qkv, out, fc1, fc2 = (layers[part] for part in ("qkv", "out", "fc1", "fc2"))
    stream = through_casts(qkv.x)
    operands = [through_casts(value) for value in attention.inputs[:3]]
    queries, keys = (producer(value, "RotaryEmbedding") for value in operands[:2])
    lengths = attention.inputs[6] if len(attention.inputs) == 7 else None
    if queries is None or keys is None or stream is None or lengths is None or attributes(keys).get("interleaved"):
        raise unlike(f"the attention of {name}")
    split = producer(operands[2], "Split")
    if split is None or split.inputs[0] is not qkv.y or len(split.outputs) != 3:
        raise unlike(f"the attention of {name}")
    if [queries.inputs[0], keys.inputs[0], operands[2]] != list(split.outputs):
        raise unlike(f"the attention of {name}")
    if through_casts(out.x) is not attention.outputs[0]:
        raise unlike(f"the attention of {name}")
    first, beside = _residual(out)
    norm1 = reader(first.outputs[0], "LayerNormalization")
    gelu = producer(through_casts(fc2.x), "Gelu")
    if gelu is None or gelu.inputs[0] is not fc1.y or attributes(gelu).get("approximate", "none") != "none":
        raise unlike(f"the GELU of {name}")
    if beside is not stream or through_casts(fc1.x) is not norm1.outputs[0]:
        raise unlike(name)
    second, beside = _residual(fc2)
    if beside is not norm1.outputs[0]:
        raise unlike(name)
    norm2 = reader(second.outputs[0], "LayerNormalization")
    return TextBlock(stream, qkv, _rotary(keys), lengths, out, norm1, fc1, fc2, norm2)


def _residual(layer: Linear) -> tuple[ir.Node, ir.Value | None]:
    """The Add of a layer's output to the residual stream, and the stream."""
    add = reader(layer.y, "Add")
    return add, next((value for value in add.inputs if value is not layer.y), None)


def _rotary(rotary: ir.Node) -> Rotary:
    cos, sin, positions = rotary.inputs[1:4]
    expanded = producer(positions, "Expand")
    rows = None if expanded is None else expanded.inputs[0]
    if cos is None or sin is None or array(cos) is None or array(sin) is None or positions is None or rows is None:
        raise unlike("a RotaryEmbedding")
    known = array(rows)
    counted = producer(rows, "Range")
    if known is not None and not np.array_equal(known.ravel(), np.arange(known.size)):
        raise unlike("a RotaryEmbedding's positions")
    if known is None and (counted is None or [array(counted.inputs[i]) for i in (0, 2)] != [0, 1]):
        raise unlike("a RotaryEmbedding's positions")
    return Rotary(cos, sin, positions)


def _is_swiglu(value: ir.Value | None, gate: Linear, up: Linear) -> bool:
    """Whether `value` is gate · sigmoid(gate) · up."""
    found = producers(value, "Mul", "Mul")
    sigmoid = producer(found[1].inputs[1], "Sigmoid") if found else None
    if sigmoid is None:
        return False
    product, silu = found
    return product.inputs[1] is up.y and silu.inputs[0] is gate.y and sigmoid.inputs[0] is gate.y
