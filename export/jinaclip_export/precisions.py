"""A tower's fp32 graph -> its graphs in other precisions, and what became of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.sessions import Arrays
from jinaclip_engines.fp16 import to_fp16
from jinaclip_engines.graph import linears, read, write
from jinaclip_engines.int8 import to_int8
from jinaclip_engines.ranges import channel_ranges


def write_precisions(fp32: Path, precisions: Sequence[str], inputs: Sequence[Arrays]) -> dict[str, Any]:
    """Write `<tower>-<precision>.onnx` beside `<tower>-fp32.onnx`.

    Args:
        fp32: the standard graph.
        precisions: some of "fp16" and "int8".
        inputs: what to run the fp32 graph with to see how large its values get: the range probe.

    Returns:
        For the manifest: "ranges", by layer the largest |input| and |output| on the probe; and by precision the
        layers that were left in float32 ("kept") and those with outlier channels ("outliers", their number).
    """
    if not precisions:
        return {}
    layers = linears(read(fp32))
    ranges = channel_ranges(fp32, [v.name or "" for layer in layers for v in (layer.x, layer.y)], inputs)
    report: dict[str, Any] = {
        "ranges": {layer.name: [_largest(ranges, v.name) for v in (layer.x, layer.y)] for layer in layers}
    }
    for precision in precisions:
        model = read(fp32)
        if precision == "fp16":
            report[precision] = {"kept": list(to_fp16(model, ranges).kept), "outliers": {}}
        else:
            done = to_int8(model, ranges)
            report[precision] = {"kept": list(done.kept), "outliers": dict(done.outliers)}
        write(model, fp32.with_name(fp32.name.replace("fp32", precision)))
    return report


def _largest(ranges: dict[str, np.ndarray], name: str | None) -> float:
    return float(f"{ranges[name or ''].max():.3g}")
