"""Rewrite the image tower's patch embedding for jinaclip's operators: `embedded_patches`.

Pixels stay uint8 until the patches are cast to float16, which represents 0 to 255 exactly. Scaling and normalisation
are folded into the weights of the product. float32 pixels are cast to float16 first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jinaclip_engines.graph import (
    HALF,
    JINACLIP,
    Linear,
    Ops,
    array,
    attributes,
    constant,
    patch_product,
    producer,
    producers,
    through_casts,
)
from jinaclip_engines.passes.onnxruntime_cuda.blocks import unlike
from jinaclip_engines.passes.onnxruntime_cuda.towers import Pending

CENTRE = 128  # centre of the range of uint8
# Largest allowed relative error of a weight column when rounded to float16. Normalisation divides weights by about 70,
# and float16 has less precision below 6e-5.
MOST_ROUNDED = 2.0**-10


@dataclass(frozen=True)
class _Prelude:
    """The patch embedding: position + [class token, patches · weight + bias].

    Attributes:
        product: linear layer on patches [B, P, 3 side²] of an image [B, 3, S, S].
        cls, position: class token [D] and position embeddings [1 + P, D].
        scale, shift: for uint8 only, [3] each: a pixel is normalised as scale · x + shift.
    """

    product: Linear
    cls: np.ndarray
    position: np.ndarray
    scale: np.ndarray | None
    shift: np.ndarray | None


def embedded_patches(model: ir.Model, stream: ir.Value) -> Pending | None:
    """Compute the first block's residual stream as a sum of a float32 and a float16 value, both [B, 1 + P, D].

    Args:
        model: the graph; modified in place.
        stream: input of the first block, float32 [B, 1 + P, D]. The caller replaces its readers.

    Returns:
        The sum. None if the graph was not changed: the patch product is float32, or its weights with the normalisation
        folded in cannot be represented in float16.

    Raises:
        PassError: the graph is not a bundle's fp16 graph.
    """
    read = _read(model, stream)
    pixels = model.graph.inputs[0]
    weight, bias = constant(read.product.weight), constant(read.product.bias)
    if weight.dtype != np.float16:
        return None
    side = math.isqrt(len(weight) // 3)
    grid = math.isqrt(len(read.position) - 1)
    if read.scale is None or read.shift is None:
        shape, axes, order = [-1, 3, grid, side, grid, side], [2, 3], [0, 2, 4, 1, 3, 5]
    else:
        shape, axes, order = [-1, grid, side, grid, 3 * side], [1, 2], [0, 1, 3, 2, 4]
        folded = _with_normalisation(weight, bias, read.scale, read.shift)
        if folded is None:
            return None
        weight, bias = folded
    half = bias.astype(np.float16)
    # The positions compensate the rounding of the bias. The class token's row of patches is zero.
    position = read.position + (bias - half.astype(np.float64))
    position[0] = read.position[0] + read.cls - half.astype(np.float64)
    with Ops(model, before=read.product.matmul) as op:
        x: ir.Value = pixels
        if read.scale is None:
            x = op("Cast", [x], to=HALF)
        if grid * side != pixels.shape[2]:  # type: ignore[index]
            limits = [np.array([0, 0]), np.array([grid * side] * 2), np.array(axes)]
            x = op("Slice", [x, *(op.const(limit) for limit in limits)])
        x = op("Transpose", [op("Reshape", [x, op.const(np.array(shape))])], perm=order)
        x = op("Reshape", [x, op.const(np.array([-1, grid * grid, len(weight)]))])
        batch = op("Shape", [pixels], start=0, end=1)
        row = op.const(np.zeros((1, 1, len(weight)), np.float16 if read.scale is None else np.uint8))
        rows = op("Expand", [row, op("Concat", [batch, op.const(np.array([1, len(weight)]))], axis=0)])
        x = op("Concat", [rows, x], axis=1)
        if read.scale is not None:
            x = op("Cast", [x], to=HALF)
        delta = op("Linear", [x, op.const(weight, "patches.weight"), op.const(half, "patches.bias")], JINACLIP)
        shape_of_stream = op("Concat", [batch, op.const(np.array(position.shape))], axis=0)
        residual = op("Expand", [op.const(position[None].astype(np.float32), "patches.positions"), shape_of_stream])
    return residual, (delta, None), stream


def _with_normalisation(
    weight: np.ndarray, bias: np.ndarray, scale: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Weight float16 and bias float64 for uint8 patches with the channel last, [side, side, 3]; None if the weight
    cannot be represented in float16.
    """
    columns = weight.shape[1]
    side = math.isqrt(len(weight) // 3)
    by_channel = weight.astype(np.float64).reshape(3, side, side, columns)
    exact = (by_channel * scale[:, None, None, None]).transpose(1, 2, 0, 3).reshape(-1, columns)
    rounded = exact.astype(np.float16)
    error = np.linalg.norm(rounded - exact, axis=0)
    if not (error <= MOST_ROUNDED * np.linalg.norm(exact, axis=0)).all():
        return None
    # The result is exact if all pixels are CENTRE, so rounding errors are as small as for centred pixels.
    constant_part = np.einsum("cxyd,c->d", by_channel, shift) + CENTRE * (exact - rounded).sum(0)
    return rounded, bias.astype(np.float64) + constant_part


def _read(model: ir.Model, stream: ir.Value) -> _Prelude:
    add = producer(stream, "Add")
    position = None if add is None else next((found for v in add.inputs if (found := array(v)) is not None), None)
    concat = None if add is None else next((node for v in add.inputs if (node := producer(v, "Concat"))), None)
    product = patch_product(model)
    if concat is None or position is None or product is None or concat.inputs[1] is not product.y:
        raise unlike("the embedding of patches")
    token = producer(concat.inputs[0], "Expand")
    cls = None if token is None else array(token.inputs[0])
    if cls is None or attributes(concat).get("axis") != 1:
        raise unlike("the embedding of patches")
    position = position[0].astype(np.float64)
    grid, side = math.isqrt(len(position) - 1), math.isqrt(len(constant(product.weight)) // 3)
    steps = producers(through_casts(product.x), "Reshape", "Transpose", "Reshape")
    if not steps or list(attributes(steps[1])["perm"]) != [0, 2, 4, 1, 3, 5]:
        raise unlike("the patches")
    split = steps[-1]
    if list(constant(split.inputs[1]))[1:] != [3, grid, side, grid, side]:
        raise unlike("the patches")
    value = through_casts(split.inputs[0])
    while (cut := producer(value, "Slice")) is not None:
        if any(array(start) is None or array(start).any() for start in cut.inputs[1:2]):  # type: ignore[union-attr]
            raise unlike("the patches")
        value = through_casts(cut.inputs[0])
    scale, shift = (None, None) if value is model.graph.inputs[0] else _normalisation(model, value)
    return _Prelude(product, cls.reshape(-1).astype(np.float64), position, scale, shift)


def _normalisation(model: ir.Model, value: ir.Value | None) -> tuple[np.ndarray, np.ndarray]:
    """(pixel / 255 - mean) / std as scale and shift by channel, float64 [3]."""
    found = producers(value, "Div", "Sub", "Div", "Transpose")
    if not found or list(attributes(found[-1])["perm"]) != [0, 3, 1, 2]:
        raise unlike("the normalisation of pixels")
    if through_casts(found[-1].inputs[0]) is not model.graph.inputs[0]:
        raise unlike("the normalisation of pixels")
    std, mean, full = (constant(node.inputs[1]).astype(np.float64).reshape(-1) for node in found[:3])
    return 1 / (full * std) * np.ones(3), -mean / std * np.ones(3)
