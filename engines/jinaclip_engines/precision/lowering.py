"""Write a tower's graphs in other precisions from its fp32 graph, and report the precision of each layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.backends.base import Arrays
from jinaclip.backends.onnxruntime.cpu import OnnxRuntimeSession
from jinaclip.embeddings import truncate
from jinaclip.terminal import say
from jinaclip_engines.graph import delete, linears, read, write
from jinaclip_engines.precision.activation_ranges import channel_ranges
from jinaclip_engines.precision.block_selection import select_blocks
from jinaclip_engines.precision.fp16 import to_fp16
from jinaclip_engines.precision.int8 import to_int8

# Required smallest cosine with fp32 on the calibration inputs, at every dim. It is stricter than the certificate's
# bound, because a certificate is measured on ten times as many inputs.
REQUIRED_COSINE = {"fp16": 0.99995, "int8": 0.997}


def write_precisions(
    fp32: Path, precisions: Sequence[str], inputs: Sequence[Arrays], output: str, dims: Sequence[int]
) -> dict[str, Any]:
    """Write `<tower>-<precision>.onnx` in the directory of `<tower>-fp32.onnx`.

    Args:
        fp32: path of the standard fp32 graph.
        precisions: any of "fp16" and "int8".
        inputs: calibration inputs, with which the fp32 graph is run to measure its activations.
        output: name of the graph output with the raw vectors.
        dims: lengths that a vector may be truncated to.

    Returns:
        The manifest's entry: "ranges", the largest |input| and |output| of each layer on the calibration inputs; and
        for each precision the layers left in float32 ("kept"), the number of outlier channels by layer ("outliers"),
        and the smallest cosine with fp32 on the calibration inputs ("cosine").
    """
    if not precisions:
        return {}
    layers = linears(read(fp32))
    ranges, expected = channel_ranges(fp32, [v.name or "" for layer in layers for v in (layer.x, layer.y)], inputs)
    report: dict[str, Any] = {
        "ranges": {layer.name: [_largest(ranges, v.name) for v in (layer.x, layer.y)] for layer in layers}
    }
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    probe = _Probe(inputs, output, np.concatenate([found[output] for found in expected]), dims)
    for precision in precisions:
        report[precision] = _lower(fp32, precision, blocks, ranges, probe)
    return report


@dataclass(frozen=True)
class _Probe:
    """Calibration inputs, and the raw fp32 vectors [N, D] that are expected at the graph output `output`."""

    inputs: Sequence[Arrays]
    output: str
    expected: np.ndarray
    dims: Sequence[int]

    def smallest_cosine(self, path: Path) -> float:
        """Smallest cosine of a graph's vectors with the expected ones, at any dim; -1 if a value is not finite."""
        with closing(OnnxRuntimeSession(path)) as session:
            found = np.concatenate([session.run(batch)[self.output] for batch in self.inputs])
        if not np.isfinite(found).all():
            return -1.0
        return min(float((truncate(found, dim) * truncate(self.expected, dim)).sum(1).min()) for dim in self.dims)


def _lower(
    fp32: Path, precision: str, blocks: Sequence[str], ranges: Mapping[str, np.ndarray], probe: _Probe
) -> dict[str, Any]:
    """Write the graph of one precision, with the selected blocks in float32. Returns its manifest entry."""
    path = fp32.with_name(fp32.name.replace("fp32", precision))
    entries: dict[tuple[str, ...], dict[str, Any]] = {}  # by the blocks in float32; the last entry's graph is on disk

    def measure(float32_blocks: Collection[str]) -> float:
        entries.pop(tuple(float32_blocks), None)
        entries[tuple(float32_blocks)] = lower(fp32, path, precision, ranges, float32_blocks)
        return probe.smallest_cosine(path)

    selection = select_blocks(blocks, measure, REQUIRED_COSINE[precision])
    if selection.blocks != next(reversed(entries)):
        lower(fp32, path, precision, ranges, selection.blocks)
    if selection.blocks:
        say(f"{precision}: {', '.join(selection.blocks)} stay in float32")
    return entries[selection.blocks] | {"cosine": round(selection.cosine, 6)}


def lower(
    fp32: Path, path: Path, precision: str, ranges: Mapping[str, np.ndarray], float32_blocks: Collection[str]
) -> dict[str, Any]:
    """Write a tower's graph in one precision.

    Args:
        fp32: path of the standard fp32 graph.
        path: path of the graph to write. An existing file is replaced.
        precision: "fp16" or "int8".
        ranges: the largest |x| of each channel, for the input and output of each linear layer, by the value's name.
        float32_blocks: blocks to leave in float32.

    Returns:
        For the manifest: the layers that were left in float32 ("kept"), and the number of outlier channels by layer
        ("outliers").
    """
    model = read(fp32)
    outliers: dict[str, int] = {}
    if precision == "fp16":
        float32_layers = to_fp16(model, ranges, float32_blocks)
    else:
        float32_layers, outliers = to_int8(model, ranges, float32_blocks)
    delete(path)
    write(model, path)
    return {"kept": float32_layers, "outliers": outliers}


def _largest(ranges: Mapping[str, np.ndarray], name: str | None) -> float:
    return float(f"{ranges[name or ''].max():.3g}")
