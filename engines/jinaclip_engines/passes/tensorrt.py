"""Rewrite a bundle's fp16 graph for TensorRT: `for_tensorrt`.

The rewritten graph computes the same as the fp16 graph, with operators whose fusion and precision TensorRT's compiler
does not change. The compiler takes precision from the graph alone. It may sum a product of float16 operands in float16,
unless the operands are cast to float32 and the result is cast back *before* the bias is added. In that pattern it sums
in float32 and stores the weights in float16. If the bias is added first, or the result is not cast back, it stores the
weights in float32, at twice the size. `jinaclip_engines.tensorrt.build_report` reads the outcome from the build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jinaclip.backends.tensorrt.session import FINITE
from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import (
    FULL,
    HALF,
    PATCHES,
    Linear,
    Ops,
    Pass,
    array,
    attributes,
    constant,
    forget_shapes,
    initializer,
    linears,
    nodes,
    only_user,
    patch_product,
    producer,
    producers,
    run_passes,
    shape_of,
    tidy,
)
from jinaclip_engines.passes.attention import before_rounding, head_size, mask_of
from jinaclip_engines.passes.cls_pooling import last_block_for_cls

# How each policy sums float16 products, attention included.
POLICIES: Mapping[str, str] = {
    "fp16-acc32": "float16 operands, sums in float32",
    "fp16-fast": "float16 operands, sums in the type that the compiler finds fastest",
}


@dataclass(frozen=True)
class Expected:
    """Requirements on the compiled graph, which `jinaclip_engines.tensorrt.build_report` checks.

    Attributes:
        attention: nodes that must each be compiled to one kernel with float16 operands: "blocks.0.attention".
        mask: name of the mask [B, 1, 1, T] of tokens that are not padding, which every attention must read; None for
            images.
        products: nodes whose weights must stay float16: "patch_embed", "blocks.0.qkv".
        float32_products: number of products with float32 weights, in blocks that are float32 in the bundle.
        weight_bytes: size of all constants, in bytes.
    """

    attention: tuple[str, ...]
    mask: str | None
    products: tuple[str, ...]
    float32_products: int
    weight_bytes: int


def for_tensorrt(model: ir.Model, policy: str, *, attention_operator: bool = True) -> Expected:
    """Rewrite a bundle's fp16 graph.

    Args:
        model: the graph; modified in place.
        policy: one of POLICIES.
        attention_operator: True keeps `Attention` as one operator, which TensorRT-RTX and TensorRT from 11.3 on compile
            with float32 sums. False replaces it with matrix products and a softmax, for earlier TensorRT versions.

    Returns:
        The requirements on the compiled graph.

    Raises:
        PassError: `policy` is unknown, or the graph is not a bundle's fp16 graph.
    """
    if policy not in POLICIES:
        raise PassError(f"policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if not _products(model):
        raise PassError("the graph has no float16 products; TensorRT needs a bundle's fp16 graph")
    width = head_size(model)
    _name_nodes(model)
    counts = run_passes(model, 0, PASSES)
    attentions = nodes(model, "Attention")
    fused = [node for node in attentions if _is_half(node)]
    expected = Expected(
        attention=tuple(node.name or "" for node in fused),
        mask=_mask_name(model),
        products=tuple(node.name or "" for node in _products(model)),
        float32_products=sum(_is_weight(node.inputs[1], FULL) for node in nodes(model, "MatMul")),
        weight_bytes=sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value),
    )
    in_float32 = policy == "fp16-acc32"
    for node in attentions:
        # TensorRT has no kernel of the operator for float32 operands or for a single query.
        single = counts["last_block_for_cls"] and node is attentions[-1]
        if not attention_operator or single or node not in fused:
            decompose_attention(model, node, width, in_float32=in_float32)
        elif not in_float32:
            attention_in_float16(node)
    if in_float32:
        sum_in_float32(model)
    tidy(model)
    forget_shapes(model)
    return expected


def int32_ids(model: ir.Model, heads: int) -> int:
    """Change the token ids to int32, which halves the bytes copied to the device."""
    ids = model.graph.inputs[0]
    if ids.dtype != ir.DataType.INT64:
        return 0
    users = list(ids.uses())
    with Ops(model, before=model.graph[0]) as op:
        wide = op("Cast", [ids], to=ir.DataType.INT64)
    for user, index in users:
        user.replace_input_with(index, wide)
    ids.type = ir.TensorType(ir.DataType.INT32)
    return 1


def half_split_rotary(model: ir.Model, heads: int) -> int:
    """Apply rotary positions to the two halves of a head instead of to neighbouring columns. The columns of queries and
    keys are permuted, which does not change their products.
    """
    count = 0
    for node in nodes(model, "RotaryEmbedding"):
        if not attributes(node).get("interleaved"):
            continue
        split = producers(node.inputs[0], "Transpose", "Reshape")  # [B, heads, T, K] <- [B, T, heads * K]
        if not split:
            raise PassError("a RotaryEmbedding is not after a standard graph's reshape; export the bundle again")
        width = 2 * constant(node.inputs[1]).shape[-1]
        order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
        _permute_columns(model, split[-1].inputs[0], order)
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 0)
        count += 1
    return count


def merge_projections(model: ir.Model, heads: int) -> int:
    """Compute queries, keys and values of an image block in one product, as text blocks already do."""
    count = 0
    by_input: dict[ir.Value, list[Linear]] = {}
    for layer in linears(model):
        if layer.cast is not None and layer.name.rpartition(".")[2] in ("q", "k", "v"):
            by_input.setdefault(layer.x, []).append(layer)
    for x, group in by_input.items():
        if len(group) != 3:  # one of them stays in float32
            continue
        weights = [constant(layer.weight) for layer in group]
        biases = [layer.bias_values() for layer in group]
        with Ops(model, before=group[0].matmul) as op:
            merged = op("MatMul", [x, op.const(np.concatenate(weights, 1))])
            _name(merged, f"{group[0].block}.qkv")
            y = op("Add", [op("Cast", [merged], to=FULL), op.const(np.concatenate(biases))])
            sizes = op.const(np.array([len(bias) for bias in biases]))
            for layer, new in zip(group, op.several("Split", [y, sizes], 3, axis=-1), strict=True):
                op.replace(layer.y, new)
        count += 1
    return count


def plain_rotary(model: ir.Model, heads: int) -> int:
    """Replace RotaryEmbedding by products with one table [T, K / 2] for all rows of a batch."""
    rotaries = nodes(model, "RotaryEmbedding")
    tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] = {}
    for node in rotaries:
        x, cos, sin, positions = node.inputs
        if attributes(node).get("interleaved"):
            raise PassError("plain_rotary must run after half_split_rotary")
        assert cos is not None and sin is not None and positions is not None
        expanded = producer(positions, "Expand")
        with Ops(model, before=node) as op:
            if (cos, positions) not in tables:
                rows = expanded.inputs[0] if expanded is not None else positions
                # [T, K / 2] or, for positions of each row, [B, 1, T, K / 2]
                gathered = [op("Gather", [table, rows], axis=0) for table in (cos, sin)]
                if expanded is None:
                    gathered = [op("Unsqueeze", [g, op.const(np.array([1]))]) for g in gathered]
                tables[cos, positions] = gathered[0], gathered[1]
            c, s = tables[cos, positions]
            first, second = op.several("Split", [x], 2, axis=-1, num_outputs=2)
            turned = [
                op("Sub", [op("Mul", [first, c]), op("Mul", [second, s])]),
                op("Add", [op("Mul", [first, s]), op("Mul", [second, c])]),
            ]
            op.replace(node.outputs[0], op("Concat", turned, axis=-1))
    return len(rotaries)


def sum_in_float32(model: ir.Model) -> None:
    """Sum products of float16 operands in float32 and round the result to float16, in the exact pattern that TensorRT's
    compiler recognises.
    """
    for node in (*_products(model), *(n for n in nodes(model, "Conv") if _is_weight(n.inputs[1], HALF))):
        x, weight, *bias = node.inputs
        with Ops(model, before=node) as op:
            full = [op("Cast", [value], to=FULL) for value in (x, weight, *bias)]
            y = op(node.op_type, full, **attributes(node))
            _name(y, node.name)
            op.replace(node.outputs[0], op("Cast", [y], to=HALF))


def attention_in_float16(node: ir.Node) -> None:
    """Connect an Attention to its float16 operands, without the casts to float32 that request float32 sums."""
    rounded = only_user(node.outputs[0], "Cast")
    if rounded is None or attributes(rounded).get("to") != HALF:
        raise PassError("the output of a float16 attention is not rounded to float16; export the bundle again")
    for index, value in enumerate(_operands(node)):
        node.replace_input_with(index, value)
    ir.convenience.replace_all_uses_with(rounded.outputs[0], node.outputs[0])


def decompose_attention(model: ir.Model, node: ir.Node, width: int, *, in_float32: bool) -> None:
    """Replace an Attention by products, mask and softmax, in the only order that TensorRT before 11.3 fuses.

    Args:
        model: the graph; modified in place.
        node: the Attention node.
        width: width of a head.
        in_float32: whether to sum the products in float32.
    """
    half = _is_half(node)
    mask = mask_of(node)
    with Ops(model, before=node) as op:
        q, k, v = _operands(node) if half else [value for value in node.inputs[:3] if value is not None]
        scale = op.const((np.float16 if half else np.float32)(1 / np.sqrt(width)))
        first = scores = op("MatMul", [op("Mul", [q, scale]), op("Transpose", [k], perm=[0, 1, 3, 2])])
        if half:
            scores = op("Cast", [scores], to=FULL)
        if mask is not None:
            scores = op("Where", [mask, scores, op.const(np.float32(-np.inf))])
        weights = op("Softmax", [scores], axis=-1)
        if half:
            weights = op("Cast", [weights], to=HALF)
        if half and in_float32:
            weights, v = op("Cast", [weights], to=FULL), op("Cast", [v], to=FULL)
        y = op("MatMul", [weights, v])
        op.replace(node.outputs[0], y)
    _name(first, f"{node.name}.scores")
    _name(y, f"{node.name}.values")


def finite_output(model: ir.Model, heads: int) -> int:
    """Add an output `all_finite`, bool [B]: whether a row's vector has no NaN or infinity, tested on its norm."""
    (norm,) = nodes(model, "Sqrt") or nodes(model, "ReduceL2")  # older bundles use ReduceL2
    order = list(model.graph)
    with Ops(model, before=order[order.index(norm) + 1]) as op:
        finite = op("LessOrEqual", [norm.outputs[0], op.const(np.float32(np.finfo(np.float32).max))])
        finite = op("Squeeze", [finite, op.const(np.array([1]))])
    finite.name, finite.type, finite.shape = FINITE, ir.TensorType(ir.DataType.BOOL), ir.Shape(["batch"])
    model.graph.outputs.append(finite)
    return 1


# The passes of every policy, in this order. None of them uses the number of heads.
PASSES: Mapping[str, Pass] = {
    "int32_ids": int32_ids,
    "half_split_rotary": half_split_rotary,
    "last_block_for_cls": last_block_for_cls,
    "merge_projections": merge_projections,
    "plain_rotary": plain_rotary,
    "finite_output": finite_output,
}


def _products(model: ir.Model) -> list[ir.Node]:
    """MatMul nodes with float16 weights, in order of execution."""
    return [node for node in nodes(model, "MatMul") if _is_weight(node.inputs[1], HALF)]


def _is_weight(value: ir.Value | None, dtype: ir.DataType) -> bool:
    return value is not None and value.dtype == dtype and len(shape_of(value)) >= 2


def _name(value: ir.Value, name: str | None) -> None:
    """Name the node that computes `value`."""
    value.producer().name = name  # type: ignore[union-attr]


def _name_nodes(model: ir.Model) -> None:
    """Name products and attentions as in the tower, "blocks.3.fc1" and "blocks.3.attention". The compiler's report uses
    these names.
    """
    layers = linears(model)
    for layer in layers:
        layer.matmul.name = layer.name
    patches = patch_product(model)
    if patches is not None:
        patches.matmul.name = PATCHES
    blocks = dict.fromkeys(layer.block for layer in layers)
    for node, block in zip(nodes(model, "Attention"), blocks, strict=True):
        node.name = f"{block}.attention"


def _mask_name(model: ir.Model) -> str | None:
    """Name of the mask before it is expanded. Every attention must have the same mask."""
    masks = (mask_of(node) for node in nodes(model, "Attention"))
    names = {mask.name for mask in masks if mask is not None}
    if len(names) > 1:
        raise PassError(f"attention has {len(names)} different masks, expected one")
    return names.pop() if names else None


def _operands(attention: ir.Node) -> list[ir.Value]:
    """Queries, keys and values as float16, before the casts to float32."""
    found = []
    for value in attention.inputs[:3]:
        cast = producer(value, "Cast")
        assert cast is not None and cast.inputs[0] is not None
        found.append(cast.inputs[0])
    return found


def _is_half(attention: ir.Node) -> bool:
    """Whether queries, keys and values of an Attention are rounded to float16 and cast back to float32."""
    return all(before_rounding(value) is not None for value in attention.inputs[:3])


def _permute_columns(model: ir.Model, value: ir.Value | None, order: np.ndarray) -> None:
    """Reorder the columns of each head in a linear layer's output, by reordering its weights and bias."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Add", "Cast"):
        step = None
        for index, source in enumerate(node.inputs):
            bias = array(source)
            if bias is None:
                step = source
            else:
                node.replace_input_with(index, _permuted(model, source, bias, order))
        node = None if step is None else step.producer()
    weight = None if node is None or node.op_type != "MatMul" else array(node.inputs[1])
    if node is None or weight is None:
        raise PassError("rotary positions do not follow a linear layer; export the bundle again")
    node.replace_input_with(1, _permuted(model, node.inputs[1], weight, order))


def _permuted(model: ir.Model, value: ir.Value | None, values: np.ndarray, order: np.ndarray) -> ir.Value:
    assert value is not None and value.name is not None
    name = value.name
    if len(list(value.uses())) == 1:
        model.graph.initializers.pop(name)  # the new one has the same name
    heads = values.reshape(*values.shape[:-1], -1, len(order))
    return initializer(model, heads[..., order].reshape(values.shape), name)
