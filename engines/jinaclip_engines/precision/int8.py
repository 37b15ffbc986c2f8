"""fp32 graph -> int8 graph, in standard operators: `to_int8`.

Weights are int8 with one scale for each output channel. Activations are quantised while the graph runs, with one
scale for each row (token): integer sums are exact, so that a row's result depends on that row alone, whatever else is
in the batch, and nothing has to be calibrated. A row x becomes bytes round(127 x / max|x|) + 128, which is what CPU
kernels are fast with; 128 is taken off again inside `MatMulInteger`.

A channel that is far larger than the others would take the whole range of its row. Such outlier channels are found
by the range probe (ranges.py) and stay in float32, as in LLM.int8() (arXiv 2208.07339): they are zeroed on the int8
side and multiplied with their own few rows of the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jinaclip_engines.graph import Linear, Ops, constant, linears, nodes, producer, shape_of

# A channel counts as an outlier from this many times the median channel's largest value ...
OUTLIER_RATIO = 5.0
# ... and a layer with more of them than this part of its channels stays in float32 altogether.
MAX_OUTLIERS = 1 / 16
# GELU is never below -0.17 (-0.16997 at -0.7518): shifted by that, its rows need no sign, and steps are half as wide.
GELU_LEAST = 0.17


@dataclass(frozen=True)
class Int8Report:
    """What became of the layers, by name.

    Attributes:
        outliers: layers with outlier channels, and how many.
        kept: layers left in float32: those of the blocks that were asked for, and those with too many.
    """

    outliers: Mapping[str, int]
    kept: tuple[str, ...]


def to_int8(model: ir.Model, ranges: Mapping[str, np.ndarray], keep: Collection[str] = ()) -> Int8Report:
    """Make the linear layers and the embedding table of a tower int8.

    Args:
        model: the standard fp32 graph; changed.
        ranges: for the input of each linear layer, by the value's name: the largest |x| of each channel [in].
        keep: blocks to leave in float32: "blocks.3".
    """
    outliers: dict[str, int] = {}
    kept: list[str] = []
    quantised: dict[tuple[str, bytes], _Rows] = {}
    for layer in linears(model):
        channels = outlier_channels(ranges[layer.x.name or ""])
        if layer.block in keep or len(channels) > MAX_OUTLIERS * shape_of(layer.weight)[0]:
            kept.append(layer.name)
            continue
        if len(channels):
            outliers[layer.name] = len(channels)
        key = (layer.x.name or "", channels.tobytes())
        if key not in quantised:  # q, k and v, or gate and up, read the same rows
            quantised[key] = _quantise_rows(model, layer, channels)
        _replace(model, layer, quantised[key], channels)
    for gather in nodes(model, "Gather"):
        if len(shape_of(gather.inputs[0])) == 2:
            _quantise_table(model, gather)
    return Int8Report(outliers, tuple(kept))


def outlier_channels(largest: np.ndarray) -> np.ndarray:
    """Indices of the channels whose largest |x| is OUTLIER_RATIO times the median channel's: int64 [n], ascending."""
    typical = np.median(largest[largest > 0]) if (largest > 0).any() else 0.0
    return np.flatnonzero(largest > OUTLIER_RATIO * typical).astype(np.int64)


def quantise_columns(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [in, out] -> int8 [in, out] and the scale of each column, float32 [out]."""
    scale = np.maximum(np.abs(weight).max(0), np.finfo(np.float32).tiny * 127) / 127
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


@dataclass(frozen=True)
class _Rows:
    """Quantised rows: x is scale · (values - zero) - shift, and beside it the outliers.

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
        if not gelu:  # two reductions are quicker than one of |x|, which has to be written first
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
        y = op("Mul", [op("Cast", [sums], to=ir.DataType.FLOAT), op.const(scale, f"{layer.name}.scale")])
        y = op("Mul", [y, rows.scale])
        if rows.outliers is not None:
            y = op("Add", [y, op("MatMul", [rows.outliers, op.const(weight[channels])])])
        bias = np.zeros_like(scale) if layer.bias is None else constant(layer.bias)
        if rows.shift:  # what the shift added to every sum
            bias = bias - np.float32(rows.shift) * quantised.sum(0, dtype=np.int64).astype(np.float32) * scale
        if layer.bias is not None or rows.shift:
            y = op("Add", [y, op.const(bias, f"{layer.name}.bias")])
        op.replace(layer.y, y)


def _quantise_table(model: ir.Model, gather: ir.Node) -> None:
    """An embedding table [rows, width] with one scale a row."""
    table, indices = gather.inputs
    assert table is not None
    values = constant(table)
    scale = np.maximum(np.abs(values).max(1, keepdims=True), np.finfo(np.float32).tiny * 127) / 127
    with Ops(model, before=gather) as op:
        rows = op("Gather", [op.const(np.rint(values / scale).astype(np.int8), f"{table.name}.int8"), indices], axis=0)
        scales = op("Gather", [op.const(scale.astype(np.float32), f"{table.name}.scale"), indices], axis=0)
        op.replace(gather.outputs[0], op("Mul", [op("Cast", [rows], to=ir.DataType.FLOAT), scales]))
