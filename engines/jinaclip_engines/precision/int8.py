"""Convert an fp32 graph to int8, in standard operators: `to_int8`.

Weights are int8 with one scale per output channel. Activations are quantised while the graph runs, with one scale per
row (token), so their scales need no calibration. Integer sums are exact, so a row's result does not depend on the other
rows of the batch. A row x becomes the bytes round(127 x / max|x|) + 128, a format for which CPU kernels are fast;
`MatMulInteger` subtracts the 128.

A channel that is much larger than the others would use the whole range of its row. Such outlier channels are found by
calibration (activation_ranges.py) and stay in float32, as in LLM.int8() (arXiv 2208.07339): they are set to zero in the
int8 product, and multiplied with their rows of the weights in a separate float32 product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jinaclip_engines.graph import FULL, Linear, Ops, constant, linears, nodes, producer, shape_of

# A channel is an outlier if its largest value is this many times the median channel's.
OUTLIER_RATIO = 5.0
# A layer in which more than this share of the channels are outliers stays in float32.
MAX_OUTLIERS = 1 / 16
# GELU is never below -0.17 (its minimum is -0.16997 at -0.7518). Its rows are shifted by this value to be non-negative,
# which halves the quantisation step.
GELU_LEAST = 0.17


def to_int8(
    model: ir.Model, ranges: Mapping[str, np.ndarray], float32_blocks: Collection[str] = ()
) -> tuple[list[str], dict[str, int]]:
    """Convert the linear layers and the embedding table of a tower to int8.

    Args:
        model: the standard fp32 graph, modified in place.
        ranges: the largest |x| of each channel [in], for the input of each linear layer, by the value's name.
        float32_blocks: blocks to leave in float32, for example "blocks.3".

    Returns:
        The layers left in float32: those of the requested blocks, and those with too many outlier channels. The number
        of outlier channels of each layer that has some.
    """
    outliers: dict[str, int] = {}
    float32_layers: list[str] = []
    quantised: dict[tuple[str, bytes], _Rows] = {}
    for layer in linears(model):
        channels = outlier_channels(ranges[layer.x.name or ""])
        if layer.block in float32_blocks or len(channels) > MAX_OUTLIERS * shape_of(layer.weight)[0]:
            float32_layers.append(layer.name)
            continue
        if len(channels):
            outliers[layer.name] = len(channels)
        key = (layer.x.name or "", channels.tobytes())
        if key not in quantised:  # q, k and v share an input, as do gate and up
            quantised[key] = _quantise_rows(model, layer, channels)
        _replace(model, layer, quantised[key], channels)
    for gather in nodes(model, "Gather"):
        if len(shape_of(gather.inputs[0])) == 2:
            _quantise_table(model, gather)
    return float32_layers, outliers


def outlier_channels(largest: np.ndarray) -> np.ndarray:
    """Indices of channels whose largest |x| exceeds OUTLIER_RATIO times the median channel's: int64 [n], ascending."""
    typical = np.median(largest[largest > 0]) if (largest > 0).any() else 0.0
    return np.flatnonzero(largest > OUTLIER_RATIO * typical).astype(np.int64)


def quantise_columns(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [in, out] -> int8 [in, out] and the scale of each column, float32 [out]."""
    scale = np.maximum(np.abs(weight).max(0), np.finfo(np.float32).tiny * 127) / 127
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


@dataclass(frozen=True)
class _Rows:
    """Quantised rows: x = scale · (values - zero) - shift, plus the outlier channels.

    values uint8 [..., in], scale float32 [..., 1], outliers float32 [..., n] or None.
    """

    values: ir.Value
    scale: ir.Value
    outliers: ir.Value | None
    zero: int
    shift: float


def _quantise_rows(model: ir.Model, layer: Linear, channels: np.ndarray) -> _Rows:
    x = layer.x
    width = shape_of(layer.weight)[0]
    gelu = producer(layer.x, "Gelu") is not None
    with Ops(model, before=layer.matmul) as op:
        outliers = None
        if len(channels):
            outliers = op("Gather", [x, op.const(channels)], axis=-1)
            ordinary = np.ones(width, np.float32)
            ordinary[channels] = 0
            x = op("Mul", [x, op.const(ordinary)])
        zero, steps = (0, 255) if gelu else (128, 127)
        x = op("Add", [x, op.const(np.float32(GELU_LEAST))]) if gelu else x
        last = op.const(np.array([-1]))
        largest = op("ReduceMax", [x, last], keepdims=1)
        if not gelu:  # two reductions are faster than computing |x| and reducing it
            largest = op("Max", [largest, op("Neg", [op("ReduceMin", [x, last], keepdims=1)])])
        scale = op("Max", [op("Mul", [largest, op.const(np.float32(1 / steps))]), op.const(np.float32(1e-30))])
        steps_each = op("Mul", [x, op("Reciprocal", [scale])])
        values = op("QuantizeLinear", [steps_each, op.const(np.float32(1)), op.const(np.uint8(zero))])
        return _Rows(values, scale, outliers, zero, GELU_LEAST if gelu else 0.0)


def _replace(model: ir.Model, layer: Linear, rows: _Rows, channels: np.ndarray) -> None:
    weight = constant(layer.weight)
    ordinary = weight.copy()
    ordinary[channels] = 0
    quantised, scale = quantise_columns(ordinary)
    with Ops(model, before=layer.matmul) as op:
        zero = op.const(np.uint8(rows.zero))
        sums = op("MatMulInteger", [rows.values, op.const(quantised, f"{layer.name}.int8"), zero])
        y = op("Mul", [op("Cast", [sums], to=FULL), op.const(scale, f"{layer.name}.scale")])
        y = op("Mul", [y, rows.scale])
        if rows.outliers is not None:
            y = op("Add", [y, op("MatMul", [rows.outliers, op.const(weight[channels])])])
        bias = layer.bias_values()
        if rows.shift:  # subtract what the shift added to each sum
            bias = bias - np.float32(rows.shift) * quantised.sum(0, dtype=np.int64).astype(np.float32) * scale
        if layer.bias is not None or rows.shift:
            y = op("Add", [y, op.const(bias, f"{layer.name}.bias")])
        op.replace(layer.y, y)


def _quantise_table(model: ir.Model, gather: ir.Node) -> None:
    """Convert an embedding table [rows, width] to int8 with one scale per row."""
    table, indices = gather.inputs
    assert table is not None
    values = constant(table)
    scale = np.maximum(np.abs(values).max(1, keepdims=True), np.finfo(np.float32).tiny * 127) / 127
    with Ops(model, before=gather) as op:
        rows = op("Gather", [op.const(np.rint(values / scale).astype(np.int8), f"{table.name}.int8"), indices], axis=0)
        scales = op("Gather", [op.const(scale.astype(np.float32), f"{table.name}.scale"), indices], axis=0)
        op.replace(gather.outputs[0], op("Mul", [op("Cast", [rows], to=FULL), scales]))
