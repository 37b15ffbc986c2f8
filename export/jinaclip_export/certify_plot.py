"""The picture of a certificate: how far from the reference which share of the items is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jinaclip.certificates import BOUNDS
from jinaclip_export.certify_measure import Vectors
from jinaclip_export.certify_numbers import cosines, unit


def draw(
    path: Path,
    found: Mapping[str, Mapping[str, Vectors | str]],
    references: Mapping[str, Mapping[str, np.ndarray]],
    dims: Sequence[int],
) -> None:
    """One field for each precision and tower, one line for each dim, the bound dashed.

    Args:
        path: .png or .svg.
        found, references: by precision and tower; without both there is nothing to draw.
    """
    fields = [
        (precision, tower, vectors.alone, references[precision][tower])
        for precision, towers in found.items()
        for tower, vectors in towers.items()
        if isinstance(vectors, Vectors) and tower in references[precision]
    ]
    figure = Figure(figsize=(8, 2.6 * max(1, len(fields))), layout="constrained")
    grid = figure.subplots(max(1, len(fields)), squeeze=False)[:, 0]
    for axes, (precision, tower, alone, reference) in zip(grid, fields, strict=False):
        for dim in dims:
            away = np.sort(np.maximum(1 - cosines(unit(alone, dim), unit(reference, dim)), 1e-10))
            axes.plot(away, np.arange(1, len(away) + 1) / len(away), label=str(dim))
        bound = BOUNDS[precision].cosine
        if bound is not None:
            axes.axvline(1 - bound, color="black", linestyle="--")
        axes.set(xscale="log", title=f"{precision} {tower}", xlabel="1 - cosine with the reference", ylabel="share")
        axes.legend(title="dim", fontsize="small")
    figure.savefig(path)
