"""Certificates as a text table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_HEAD = ("", "dim", "cosine min", "1 %", "mean", "max abs", "error÷nearest", "median", "top 10", "across")


def render(certificates: Sequence[dict[str, Any]]) -> str:
    """One line for each dim of each tower and precision, then the verdicts with their reasons."""
    lines: list[tuple[str, ...]] = []
    verdicts: list[str] = []
    for certificate in certificates:
        for tower, entry in certificate["towers"].items():
            name = f"{certificate['precision']} {tower}"
            lines += ((name, *cells) for cells in _lines(entry))
            verdicts += [f"{name}: {_verdict(entry)}", *(f"  {reason}" for reason in entry["reasons"])]
    if not lines:
        return "\n".join(verdicts)
    widths = [max(len(line[i]) for line in (_HEAD, *lines)) for i in range(len(_HEAD))]
    table = []
    for line in (_HEAD, *lines):
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        table.append("  ".join((line[0].ljust(widths[0]), *cells)))
    return "\n".join([*table, "", *verdicts])


def _lines(entry: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for dim, numbers in entry.get("dims", {}).items():
        cosine, ratio, top10 = numbers["cosine"], numbers["error_ratio"], numbers["top10"]
        yield (
            dim,
            *(f"{cosine[name]:.7f}" for name in ("min", "p1", "mean")),
            f"{numbers['max_abs']:.1e}",
            f"{ratio['max']:.2g}",
            f"{ratio['median']:.2g}",
            f"{top10['within']:.3f}",
            f"{top10['across']:.3f}" if "across" in top10 else "-",
        )


def _verdict(entry: dict[str, Any]) -> str:
    said = f"{entry['verdict']}; {entry['items']} items ({entry['source']})"
    if batch := entry.get("batch"):
        said += f"; in a batch with an outlier: cosine {batch['cosine']:.8f}, max abs {batch['max_abs']:.1e}"
    if known := entry.get("known_answers"):
        said += f"; known answers: error {known['max_error']:.1e}"
    return said
