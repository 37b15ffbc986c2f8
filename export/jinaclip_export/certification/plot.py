"""Plot of a certificate: cumulative distribution of the items' distances to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jinaclip.bundle.certificates import BOUNDS
from jinaclip_export.certification.measure import Measurement, Vectors
from jinaclip_export.certification.metrics import cosines, unit


def draw(path: Path, measurements: Sequence[Measurement]) -> None:
    """Draw one panel per precision and tower with a reference, one line per dim, and the bound as a dashed line."""
    fields = [
        (m.precision, tower, vectors, m.references[tower])
        for m in measurements
        for tower, vectors in m.found.items()
        if isinstance(vectors, Vectors) and tower in m.references
    ]
    figure = Figure(figsize=(8, 2.6 * max(1, len(fields))), layout="constrained")
    grid = figure.subplots(max(1, len(fields)), squeeze=False)[:, 0]
    for axes, (precision, tower, vectors, reference) in zip(grid, fields, strict=False):
        for dim in vectors.dims:
            away = np.sort(np.maximum(1 - cosines(unit(vectors.alone, dim), unit(reference, dim)), 1e-15))
            axes.plot(away, np.arange(1, len(away) + 1) / len(away), label=str(dim))
        bound = BOUNDS[precision].cosine
        if bound is not None:
            axes.axvline(1 - bound, color="black", linestyle="--")
        axes.set(xscale="log", title=f"{precision} {tower}", xlabel="1 - cosine with the reference", ylabel="share")
        axes.legend(title="dim", fontsize="small")
    figure.savefig(path)
