"""Passes for ONNX Runtime's CUDA provider, for a bundle's fp16 graph: `for_cuda`.

The provider's flash attention needs float16 [B, T, D] and no mask. Padding must be given as the number of tokens of
each row (`nonpad_kv_seqlen`, opset 24). With a mask or with float32 operands, the provider uses slower kernels or
computes the matrix of all scores (microsoft/onnxruntime pull request 27542). Flash attention and cuBLAS's float16
products both sum in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import Ops, array, attributes, constant, forget_shapes, nodes, only_user, producer, tidy
from jinaclip_engines.passes.cls_pooling import last_block_for_cls
from jinaclip_engines.passes.onnxruntime_cuda.operators import fused_operators
from jinaclip_engines.passes.onnxruntime_cuda.packed_text import packed_text
from jinaclip_engines.passes.onnxruntime_cuda.standard import fewer_casts

HALF, FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT


def for_cuda(model: ir.Model, heads: int, operators: bool = False) -> dict[str, int]:
    """Run the passes.

    Args:
        model: a bundle's fp16 graph; modified in place.
        heads: attention heads of the tower.
        operators: whether to use jinaclip's own operators (runtime/c-library/cuda) in float16 blocks.

    Returns:
        The number of changes by pass. "packed_text" is 0 for images, and for texts whose padding is not removed because
        a block is float32 or, with `operators`, heads are not 64 wide.

    Raises:
        PassError: the graph is not a bundle's fp16 graph.
    """
    counts = {}
    for name, step in (PASSES | (OPERATOR_PASSES if operators else STANDARD_PASSES)).items():
        counts[name] = step(model, heads)
        tidy(model)
    forget_shapes(model)
    return counts


def flash_attention(model: ir.Model, heads: int) -> int:
    """Run attention on float16 [B, T, D], with numbers of tokens instead of a mask. Float32 blocks are not changed."""
    count = 0
    lengths: ir.Value | None = None
    for attention in nodes(model, "Attention"):
        sources = [_source(value) for value in attention.inputs[:3]]
        halved = only_user(attention.outputs[0], "Cast")
        widened = halved and only_user(halved.outputs[0], "Cast")
        merged = widened and only_user(widened.outputs[0], "Transpose")
        flat = merged and only_user(merged.outputs[0], "Reshape")
        if all(source is None for source in sources):
            continue
        if flat is None or None in sources:
            raise PassError("a float16 Attention is not between the casts and reshapes of a bundle's fp16 graph")
        mask = attention.inputs[3] if len(attention.inputs) > 3 else None
        if mask is not None and lengths is None:
            lengths = _lengths(model, attention, mask)
        with Ops(model, before=attention) as op:
            inputs: list[ir.Value | None] = []
            for source in sources:
                assert source is not None
                value, rotary = source
                if rotary is not None:
                    interleaved = int(attributes(rotary).get("interleaved") or 0)
                    inner = [value, *rotary.inputs[1:]]
                    value = op("RotaryEmbedding", inner, num_heads=heads, interleaved=interleaved)
                inputs.append(op("Cast", [value], to=HALF))
            padding = [] if mask is None else [None, None, None, lengths]
            y = op("Attention", [*inputs, *padding], q_num_heads=heads, kv_num_heads=heads)
            op.replace(flat.outputs[0], op("Cast", [y], to=FULL))
        count += 1
    if lengths is not None:
        model.graph.opset_imports[""] = max(24, model.graph.opset_imports[""])
    return count


def cast_pairs(model: ir.Model, heads: int) -> int:
    """Remove casts float16 -> float32 -> float16, which change nothing but would run as two kernels."""
    count = 0
    for down in nodes(model, "Cast"):
        up = producer(down.inputs[0], "Cast")
        source = None if up is None else up.inputs[0]
        origin = None if source is None else source.producer()
        if attributes(down).get("to") == HALF and source is not None and origin is not None and _is_half(origin):
            ir.convenience.replace_all_uses_with(down.outputs[0], source)
            count += 1
    return count


def without_cudnn(model: ir.Model, heads: int) -> int:
    """Replace ReduceL2 and the patch Conv of older bundles by operators whose CUDA kernels do not need cuDNN."""
    count = 0
    for node in nodes(model, "ReduceL2"):
        with Ops(model, before=node) as op:
            squares = op("ReduceSum", [op("Mul", [node.inputs[0], node.inputs[0]]), node.inputs[1]], keepdims=1)
            op.replace(node.outputs[0], op("Sqrt", [squares]))
        count += 1
    for node in nodes(model, "Conv"):
        _patch_product(model, node)
        count += 1
    return count


def _patch_product(model: ir.Model, convolution: ir.Node) -> None:
    """Replace the patch convolution of older bundles by a matrix product, [B, 3, S, S] -> [B, P, width]."""
    x, weight, bias = convolution.inputs
    cast = only_user(convolution.outputs[0], "Cast")
    flat = only_user((cast or convolution).outputs[0], "Reshape")
    merged = flat and only_user(flat.outputs[0], "Transpose")
    values = array(weight)
    if merged is None or values is None or bias is None:
        raise PassError("a Conv is not the patch convolution of a bundle's graph; export the bundle again")
    width, channels, side, _ = values.shape
    size = _picture_size(model)
    grid = size // side
    with Ops(model, before=convolution) as op:
        if size % side:
            end = op.const(np.array([grid * side] * 2))
            x = op("Slice", [x, op.const(np.array([0, 0])), end, op.const(np.array([2, 3]))])
        x = op("Reshape", [x, op.const(np.array([-1, channels, grid, side, grid, side]))])
        x = op("Transpose", [x], perm=[0, 2, 4, 1, 3, 5])
        x = op("Reshape", [x, op.const(np.array([-1, grid * grid, channels * side * side]))])
        y = op("MatMul", [x, op.const(np.ascontiguousarray(values.reshape(width, -1).T))])
        if cast is not None:
            y = op("Cast", [y], to=FULL)
        full = op.const(constant(bias).astype(np.float32), "tower.patch_embed.bias")
        op.replace(merged.outputs[0], op("Add", [y, full]))


def _picture_size(model: ir.Model) -> int:
    """Side S of the image input in pixels: uint8 [B, S, S, 3] or float32 [B, 3, S, S]."""
    return int(model.graph.inputs[0].shape[2])  # type: ignore[index, arg-type]


PASSES: dict[str, Callable[[ir.Model, int], int]] = {
    "without_cudnn": without_cudnn,
    "last_block_for_cls": last_block_for_cls,
    "flash_attention": flash_attention,
    "cast_pairs": cast_pairs,
}
STANDARD_PASSES: dict[str, Callable[[ir.Model, int], int]] = {"fewer_casts": fewer_casts, "packed_text": packed_text}
OPERATOR_PASSES: dict[str, Callable[[ir.Model, int], int]] = {
    "fused_operators": fused_operators,
    "packed_text": packed_text,
}


def _source(value: ir.Value | None) -> tuple[ir.Value, ir.Node | None] | None:
    """The value [B, T, D] float32 from which a float16 input of Attention was made, and its rotary node; None for an
    input that is not rounded to float16.
    """
    widened = producer(value, "Cast")
    halved = producer(widened.inputs[0], "Cast") if widened else None
    if halved is None or attributes(halved).get("to") != HALF:
        return None
    rotary = producer(halved.inputs[0], "RotaryEmbedding")
    transpose = producer(rotary.inputs[0] if rotary else halved.inputs[0], "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose else None
    source = reshape.inputs[0] if reshape else None
    if source is None:
        raise PassError("a float16 Attention is not after the reshapes of an fp16 graph; export the bundle again")
    return source, rotary


def _lengths(model: ir.Model, before: ir.Node, mask: ir.Value) -> ir.Value:
    """Number of tokens of each row that are not padding, int64 [B]."""
    expand = producer(mask, "Expand")
    if expand is None or expand.inputs[0] is None:
        raise PassError("the attention mask is not expanded from [B, 1, 1, T]; export the bundle again")
    with Ops(model, before=before) as op:
        keep = op("Cast", [expand.inputs[0]], to=ir.DataType.INT64)
        return op("ReduceSum", [keep, op.const(np.array([1, 2, 3]))], keepdims=0)


def _is_half(node: ir.Node) -> bool:
    """Whether a node computes float16."""
    if node.op_type == "Cast":
        return attributes(node).get("to") == HALF
    if node.op_type not in ("MatMul", "Attention", "Gather"):
        return False
    for value in node.inputs[:2]:
        if value is not None and value.producer() is None and value.dtype == HALF:
            return True
        cast = producer(value, "Cast")
        if cast is not None and attributes(cast).get("to") == HALF:
            return True
    return False
