"""A bundle's fp16 graph -> the graph that TensorRT compiles: `for_tensorrt`.

The numbers stay those of the fp16 graph, in operators whose fusion and precision TensorRT's compiler leaves as they are
written. It takes precision from the graph alone: a product of float16 operands may be summed in float16 by any kernel
that it likes, unless the operands are cast to float32, with the result cast back *before* the bias is added. Then it
sums in float32 and still keeps float16 weights. With the bias first, or no cast back, it computes in float32 with
weights of twice the size. `jinaclip_engines.tensorrt.build_report` reads from the build which one it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jinaclip.backends.tensorrt.session import FINITE
from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import (
    PATCHES,
    Linear,
    Ops,
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
    tidy,
)
from jinaclip_engines.passes.cls_pooling import last_block_for_cls

# What a policy asks of the sums of float16 products, attention's included.
POLICIES: Mapping[str, str] = {
    "fp16-acc32": "float16 operands, sums in float32",
    "fp16-fast": "float16 operands, sums in whatever type the compiler finds quickest",
}
HALF = ir.DataType.FLOAT16
FULL = ir.DataType.FLOAT


@dataclass(frozen=True)
class Expected:
    """What the compiler must make of the graph; `jinaclip_engines.tensorrt.build_report` holds it to that.

    Attributes:
        attention: nodes that must each become one kernel with float16 operands: "blocks.0.attention".
        mask: the value [B, 1, 1, T] that says which tokens are not padding, which each of them must read; None for
            images.
        products: nodes with float16 weights, which must keep them: "patch_embed", "blocks.0.qkv".
        float32_products: how many have float32 weights, in blocks that the bundle keeps so.
        weight_bytes: of all constants.
    """

    attention: tuple[str, ...]
    mask: str | None
    products: tuple[str, ...]
    float32_products: int
    weight_bytes: int


def for_tensorrt(model: ir.Model, policy: str, *, attention_operator: bool = True) -> Expected:
    """Rewrite a bundle's fp16 graph.

    Args:
        model: changed.
        policy: of POLICIES.
        attention_operator: leave `Attention` one operator, which TensorRT-RTX and TensorRT from 11.3 on compile with
            float32 sums; False spells it out in matrix products and a softmax, for TensorRT before that.

    Raises:
        PassError: the graph is no fp16 graph of a bundle.
    """
    if policy not in POLICIES:
        raise PassError(f"policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if not _products(model):
        raise PassError("the graph has no float16 products; TensorRT needs a bundle's fp16 graph")
    head_size = 2 * constant(nodes(model, "RotaryEmbedding")[0].inputs[1]).shape[-1]
    _name_nodes(model)
    counts = {}
    for step in PASSES:
        counts[step] = step(model)
        tidy(model)
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
        # The operator has no kernel for float32 operands, nor for a single query.
        single = counts[cls_alone] and node is attentions[-1]
        if not attention_operator or single or node not in fused:
            spell_out_attention(model, node, head_size, in_float32=in_float32)
        elif not in_float32:
            attention_in_float16(node)
    if in_float32:
        sum_in_float32(model)
    tidy(model)
    forget_shapes(model)
    return expected


def int32_ids(model: ir.Model) -> int:
    """Token ids as int32: half the bytes to the device."""
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


def half_split_rotary(model: ir.Model) -> int:
    """Rotary positions over the two halves of a head instead of neighbours: the columns of queries and keys change
    places, which leaves their products as they are.
    """
    count = 0
    for node in nodes(model, "RotaryEmbedding"):
        if not attributes(node).get("interleaved"):
            continue
        value = node.inputs[0]
        for op_type in ("Transpose", "Reshape"):  # [B, heads, T, K] <- [B, T, heads * K]
            found = producer(value, op_type)
            if found is None:
                raise PassError("a RotaryEmbedding is not after the reshape of a standard graph; export it again")
            value = found.inputs[0]
        tables = constant(node.inputs[1])
        head = 2 * tables.shape[-1]
        within = np.concatenate([np.arange(0, head, 2), np.arange(1, head, 2)])
        _permute_columns(model, value, within)
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 0)
        count += 1
    return count


def merge_projections(model: ir.Model) -> int:
    """Queries, keys and values of an image block as one product, as a text block has them."""
    count = 0
    by_input: dict[ir.Value, list[Linear]] = {}
    for layer in linears(model):
        if layer.cast is not None and layer.name.rpartition(".")[2] in ("q", "k", "v"):
            by_input.setdefault(layer.x, []).append(layer)
    for x, group in by_input.items():
        if len(group) != 3:  # one of them stays in float32
            continue
        weights = [constant(layer.weight) for layer in group]
        biases = [
            np.zeros(weight.shape[1], np.float32) if layer.bias is None else constant(layer.bias)
            for layer, weight in zip(group, weights, strict=True)
        ]
        with Ops(model, before=group[0].matmul) as op:
            merged = op("MatMul", [x, op.const(np.concatenate(weights, 1))])
            merged.producer().name = f"{group[0].block}.qkv"  # type: ignore[union-attr]
            y = op("Add", [op("Cast", [merged], to=FULL), op.const(np.concatenate(biases))])
            sizes = op.const(np.array([len(bias) for bias in biases]))
            for layer, new in zip(group, op.several("Split", [y, sizes], 3, axis=-1), strict=True):
                op.replace(layer.y, new)
        count += 1
    return count


def plain_rotary(model: ir.Model) -> int:
    """RotaryEmbedding over positions 0 … T-1 as products with one table [T, K / 2], not one for each row of a batch."""
    count = 0
    tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] = {}
    for node in nodes(model, "RotaryEmbedding"):
        x, cos, sin, positions = node.inputs
        if attributes(node).get("interleaved"):
            raise PassError("plain_rotary comes after half_split_rotary")
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
        count += 1
    return count


def sum_in_float32(model: ir.Model) -> int:
    """Products of float16 operands summed in float32, the result rounded to float16 as before: the exact pattern that
    TensorRT's compiler reads as such.
    """
    count = 0
    for node in (*_products(model), *(n for n in nodes(model, "Conv") if _is_weight(n.inputs[1], HALF))):
        x, weight, *bias = node.inputs
        with Ops(model, before=node) as op:
            full = [op("Cast", [value], to=FULL) for value in (x, weight, *bias)]
            y = op(node.op_type, full, **attributes(node))
            y.producer().name = node.name  # type: ignore[union-attr]
            op.replace(node.outputs[0], op("Cast", [y], to=HALF))
        count += 1
    return count


def attention_in_float16(node: ir.Node) -> None:
    """An Attention on its float16 operands, without the casts to float32 that ask for float32 sums."""
    rounded = only_user(node.outputs[0], "Cast")
    if rounded is None or attributes(rounded).get("to") != HALF:
        raise PassError("the output of a float16 attention is not rounded to float16; export the bundle again")
    for index, value in enumerate(_operands(node)):
        node.replace_input_with(index, value)
    ir.convenience.replace_all_uses_with(rounded.outputs[0], node.outputs[0])


def spell_out_attention(model: ir.Model, node: ir.Node, head_size: int, *, in_float32: bool) -> None:
    """An Attention as products, mask and softmax, in the one order that TensorRT before 11.3 fuses.

    Args:
        in_float32: sum the products in float32.
    """
    half = _is_half(node)
    mask = _mask(node)
    with Ops(model, before=node) as op:
        q, k, v = _operands(node) if half else [value for value in node.inputs[:3] if value is not None]
        scale = op.const((np.float16 if half else np.float32)(1 / np.sqrt(head_size)))
        first = scores = op("MatMul", [op("Mul", [q, scale]), op("Transpose", [k], perm=[0, 1, 3, 2])])
        if half:
            scores = op("Cast", [scores], to=FULL)
        if mask is not None:
            expand = producer(mask, "Expand")
            keep = mask if expand is None else expand.inputs[0]  # [B, 1, 1, T]
            scores = op("Where", [keep, scores, op.const(np.float32(-np.inf))])
        weights = op("Softmax", [scores], axis=-1)
        if half:
            weights = op("Cast", [weights], to=HALF)
        if half and in_float32:
            weights, v = op("Cast", [weights], to=FULL), op("Cast", [v], to=FULL)
        y = op("MatMul", [weights, v])
        op.replace(node.outputs[0], y)
    for step, value in (("scores", first), ("values", y)):
        value.producer().name = f"{node.name}.{step}"  # type: ignore[union-attr]


def finite_output(model: ir.Model) -> int:
    """One more output, `all_finite` bool [B]: whether a row's vector has neither NaN nor infinity, told by its norm."""
    (norm,) = nodes(model, "Sqrt") or nodes(model, "ReduceL2")  # the latter in older bundles
    with Ops(model, before=_after(model, norm)) as op:
        finite = op("LessOrEqual", [norm.outputs[0], op.const(np.float32(np.finfo(np.float32).max))])
        finite = op("Squeeze", [finite, op.const(np.array([1]))])
    finite.name, finite.type, finite.shape = FINITE, ir.TensorType(ir.DataType.BOOL), ir.Shape(["batch"])
    model.graph.outputs.append(finite)
    return 1


def cls_alone(model: ir.Model) -> int:
    """The last image block for the one token that is read."""
    return last_block_for_cls(model, 0)


# In this order, whatever the policy.
PASSES: tuple[Callable[[ir.Model], int], ...] = (
    int32_ids,
    half_split_rotary,
    cls_alone,
    merge_projections,
    plain_rotary,
    finite_output,
)


def _after(model: ir.Model, node: ir.Node) -> ir.Node:
    """The node that comes next."""
    order = list(model.graph)
    return order[order.index(node) + 1]


def _products(model: ir.Model) -> list[ir.Node]:
    """MatMul nodes with float16 weights, in order of execution."""
    return [node for node in nodes(model, "MatMul") if _is_weight(node.inputs[1], HALF)]


def _is_weight(value: ir.Value | None, dtype: ir.DataType) -> bool:
    found = None if value is None or value.producer() is not None else value.const_value
    return found is not None and found.dtype == dtype and len(found.shape) >= 2


def _name_nodes(model: ir.Model) -> None:
    """Call products and attentions what the tower calls them, "blocks.3.fc1" and "blocks.3.attention": the compiler's
    report speaks of nodes by these names.
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
    """Of the mask before it is expanded, the same for every attention."""
    names = set()
    for node in nodes(model, "Attention"):
        mask = _mask(node)
        if mask is not None:
            expand = producer(mask, "Expand")
            source = None if expand is None else expand.inputs[0]
            if source is None:
                raise PassError("the attention mask is not expanded from [B, 1, 1, T]; export the bundle again")
            names.add(source.name)
    if len(names) > 1:
        raise PassError(f"attention has {len(names)} different masks, expected one")
    return names.pop() if names else None


def _mask(attention: ir.Node) -> ir.Value | None:
    return attention.inputs[3] if len(attention.inputs) > 3 else None


def _operands(attention: ir.Node) -> list[ir.Value]:
    """Queries, keys and values as float16, before the casts to float32."""
    found = []
    for value in attention.inputs[:3]:
        cast = producer(value, "Cast")
        assert cast is not None and cast.inputs[0] is not None
        found.append(cast.inputs[0])
    return found


def _is_half(attention: ir.Node) -> bool:
    """Whether queries, keys and values of an Attention were rounded to float16, and cast back to float32."""
    for value in attention.inputs[:3]:
        rounded = producer(value, "Cast")
        rounded = None if rounded is None else producer(rounded.inputs[0], "Cast")
        if rounded is None or attributes(rounded).get("to") != HALF:
            return False
    return True


def _permute_columns(model: ir.Model, value: ir.Value | None, within: np.ndarray) -> None:
    """Reorder the columns of each head of a linear layer's output, in its weights and bias."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Add", "Cast"):
        step = None
        for index, source in enumerate(node.inputs):
            bias = array(source)
            if bias is None:
                step = source
            else:
                node.replace_input_with(index, _permuted(model, source, bias, within))
        node = None if step is None else step.producer()
    weight = None if node is None or node.op_type != "MatMul" else array(node.inputs[1])
    if node is None or weight is None:
        raise PassError("rotary positions do not follow a linear layer; export the bundle again")
    node.replace_input_with(1, _permuted(model, node.inputs[1], weight, within))


def _permuted(model: ir.Model, value: ir.Value | None, values: np.ndarray, within: np.ndarray) -> ir.Value:
    assert value is not None and value.name is not None
    name = value.name
    if len(list(value.uses())) == 1:
        model.graph.initializers.pop(name)  # the new one is called the same
    heads = values.reshape(*values.shape[:-1], -1, len(within))
    return initializer(model, heads[..., within].reshape(values.shape), name)
