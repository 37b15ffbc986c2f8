"""Passes for ONNX Runtime's CUDA provider, for a bundle's fp16 graph: `for_cuda`.

The provider's flash attention needs float16 [B, T, D] and no mask. Padding must be given as the number of tokens of
each row (`nonpad_kv_seqlen`, opset 24). With a mask or with float32 operands, the provider uses slower kernels or
computes the matrix of all scores (microsoft/onnxruntime pull request 27542). Flash attention and cuBLAS's float16
products both sum in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import (
    FULL,
    HALF,
    Ops,
    Pass,
    array,
    attributes,
    constant,
    nodes,
    only_user,
    only_users,
    producer,
    run_passes,
)
from jinaclip_engines.passes.attention import before_rounding, before_split, mask_of
from jinaclip_engines.passes.cls_pooling import last_block_for_cls
from jinaclip_engines.passes.onnxruntime_cuda.operators import fused_operators
from jinaclip_engines.passes.onnxruntime_cuda.packed_text import packed_text
from jinaclip_engines.passes.onnxruntime_cuda.standard import fewer_casts


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
    return run_passes(model, heads, PASSES | (OPERATOR_PASSES if operators else STANDARD_PASSES))


def flash_attention(model: ir.Model, heads: int) -> int:
    """Run attention on float16 [B, T, D], with numbers of tokens instead of a mask. Float32 blocks are not changed."""
    count = 0
    lengths: ir.Value | None = None
    for attention in nodes(model, "Attention"):
        sources = [source for value in attention.inputs[:3] if (source := _source(value)) is not None]
        merged = only_users(attention.outputs[0], "Cast", "Cast", "Transpose", "Reshape")
        if not sources:
            continue
        if not merged or len(sources) < 3:
            raise PassError("a float16 Attention is not between the casts and reshapes of a bundle's fp16 graph")
        mask = mask_of(attention)
        with Ops(model, before=attention) as op:
            if mask is not None and lengths is None:  # number of tokens of each row that are not padding, int64 [B]
                keep = op("Cast", [mask], to=ir.DataType.INT64)
                lengths = op("ReduceSum", [keep, op.const(np.array([1, 2, 3]))], keepdims=0)
            inputs: list[ir.Value | None] = []
            for value, rotary in sources:
                if rotary is not None:
                    interleaved = int(attributes(rotary).get("interleaved") or 0)
                    inner = [value, *rotary.inputs[1:]]
                    value = op("RotaryEmbedding", inner, num_heads=heads, interleaved=interleaved)
                inputs.append(op("Cast", [value], to=HALF))
            padding = [] if mask is None else [None, None, None, lengths]
            y = op("Attention", [*inputs, *padding], q_num_heads=heads, kv_num_heads=heads)
            op.replace(merged[-1].outputs[0], op("Cast", [y], to=FULL))
        count += 1
    if lengths is not None:
        model.graph.opset_imports[""] = max(24, model.graph.opset_imports[""])
    return count


def cast_pairs(model: ir.Model, heads: int) -> int:
    """Remove casts float16 -> float32 -> float16, which change nothing but would run as two kernels."""
    count = 0
    for down in nodes(model, "Cast"):
        up = producer(down.inputs[0], "Cast")
        source = up.inputs[0] if up else None
        origin = source.producer() if source else None
        if source and origin and attributes(down).get("to") == HALF and _is_half(origin):
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
    merged = only_users((cast or convolution).outputs[0], "Reshape", "Transpose")
    values = array(weight)
    if not merged or values is None or bias is None:
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
        op.replace(merged[-1].outputs[0], op("Add", [y, full]))


def _picture_size(model: ir.Model) -> int:
    """Side S of the image input in pixels: uint8 [B, S, S, 3] or float32 [B, 3, S, S]."""
    return int(model.graph.inputs[0].shape[2])  # type: ignore[index, arg-type]


PASSES: dict[str, Pass] = {
    "without_cudnn": without_cudnn,
    "last_block_for_cls": last_block_for_cls,
    "flash_attention": flash_attention,
    "cast_pairs": cast_pairs,
}
STANDARD_PASSES: dict[str, Pass] = {"fewer_casts": fewer_casts, "packed_text": packed_text}
OPERATOR_PASSES: dict[str, Pass] = {"fused_operators": fused_operators, "packed_text": packed_text}


def _source(value: ir.Value | None) -> tuple[ir.Value, ir.Node | None] | None:
    """The value [B, T, D] float32 from which a float16 input of Attention was made, and its rotary node; None for an
    input that is not rounded to float16.
    """
    exact = before_rounding(value)
    if exact is None:
        return None
    source = before_split(exact)
    if source is None:
        raise PassError("a float16 Attention is not after the reshapes of an fp16 graph; export the bundle again")
    return source


def _is_half(node: ir.Node) -> bool:
    """Whether a node computes float16."""
    if node.op_type == "Cast":
        return attributes(node).get("to") == HALF
    if node.op_type not in ("MatMul", "Attention", "Gather"):
        return False
    for value in node.inputs[:2]:
        cast = producer(value, "Cast")
        weight = value is not None and value.producer() is None and value.dtype == HALF
        if weight or (cast is not None and attributes(cast).get("to") == HALF):
            return True
    return False
