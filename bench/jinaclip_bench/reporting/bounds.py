"""Bounds on measured figures, and the check of a run against them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jinaclip_bench.measuring.timing import is_jinaclip, jinaclip_side, precision_of

Record = Mapping[str, Any]
TORCHS_BEST = "torch's best"  # the fastest of torch's sides in the run


@dataclass(frozen=True)
class Figure:
    """A figure of jinaclip's side that has an absolute bound.

    Attributes:
        description: description of the figure.
        at_least: whether larger values are better.
    """

    description: str
    at_least: bool


FIGURES = {
    "above_load_mib": Figure("MiB added by the call", at_least=False),
    "device_ms": Figure("ms on the device", at_least=False),
    "matmul_share": Figure("share of the matmul rate", at_least=True),
}


@dataclass(frozen=True)
class Measured:
    """The measured value of a bounded figure.

    Attributes:
        figures: p50, p10 and p90.
        sides: the sides that were compared.
    """

    figures: Mapping[str, float]
    sides: str


@dataclass(frozen=True)
class Bound:
    """A bound on a median. It applies to the fastest of jinaclip's sides of the case in the precision.

    Attributes:
        suite: suite in whose table the bound is listed.
        case: a name in jinaclip_bench.cases.table.CASES.
        precision: precision of jinaclip's side.
        figure: a side, for a lower bound on the ratio of its time to jinaclip's; or a field of FIGURES, for an absolute
            bound.
        limit: the bound; None if the figure is only reported.
        target: desired value, stricter than the limit; None if there is none.
    """

    suite: str
    case: str
    precision: str
    figure: str
    limit: float | None
    target: float | None = None

    @property
    def description(self) -> str:
        """Description of the bounded figure."""
        side = jinaclip_side(self.precision)
        return f"{side}, {FIGURES[self.figure].description}" if self.figure in FIGURES else f"{self.figure} ÷ {side}"

    @property
    def at_least(self) -> bool:
        """Whether the figure is bounded from below."""
        return self.figure not in FIGURES or FIGURES[self.figure].at_least

    def measured(self, records: Iterable[Record]) -> Measured | None:
        """The figure's value in a run; None if it was not measured."""
        of_case = [record for record in records if record["case"] == self.case]
        base = _fastest(r for r in of_case if is_jinaclip(r["side"]) and precision_of(r["side"]) == self.precision)
        if base is None:
            return None
        if self.figure in FIGURES:
            figures = base[self.figure]
            return None if figures is None else Measured(figures, base["side"])
        of_torch = self.figure == TORCHS_BEST
        other = _fastest(
            r for r in of_case if r["side"] == self.figure or (of_torch and r["side"].startswith("torch-"))
        )
        if other is None or base["side"] not in other["against"]:
            return None
        return Measured(other["against"][base["side"]], f"{other['side']} ÷ {base['side']}")

    def holds(self, median: float) -> bool:
        """Whether a median satisfies the bound. It always does if the figure is only reported."""
        return self.limit is None or self._satisfies(median, self.limit)

    def verdict(self, median: float) -> str:
        """Text of the verdict on a median."""
        verdicts = [] if self.limit is None else ["holds" if self.holds(median) else "MISSED"]
        if self.target is not None:
            verdicts.append(f"target {'met' if self._satisfies(median, self.target) else 'missed'}")
        return ", ".join(verdicts)

    def _satisfies(self, median: float, limit: float) -> bool:
        return median >= limit if self.at_least else median <= limit


def _fastest(records: Iterable[Record]) -> Record | None:
    return min(records, key=lambda record: record["p50"], default=None)


BOUNDS = (
    Bound("cpu", "text-8x128", "int8", "torch-fp32", 2.6),
    Bound("cpu", "text-8x128", "int8", "torch-bf16", 1.15),
    Bound("cpu", "mix-512", "int8", "torch-fp32", 2.8),
    Bound("cpu", "mix-512", "int8", "torch-fp32-unsorted", 5.0),
    Bound("cpu", "mix-2048", "int8", "torch-fp32", 2.8),
    Bound("cpu", "mix-2048", "int8", "torch-fp32-unsorted", 5.0),
    Bound("cpu", "image-1", "int8", "torch-fp32", 3.15),
    Bound("cpu", "image-1", "int8", "torch-bf16", 1.6),
    Bound("cpu", "query-dummy-image", "fp32", "fused-onnx", 20.0),
    Bound("cpu", "text-8192", "fp32", "above_load_mib", 2048.0),
    Bound("cpu", "text-8192", "int8", "above_load_mib", 2048.0),
    Bound("gpu", "image-32", "fp16", TORCHS_BEST, 1.0, target=1.3),
    Bound("gpu", "image-32", "fp16", "matmul_share", 0.45, target=0.6),
    Bound("gpu", "bulk-512", "fp16", TORCHS_BEST, 1.2, target=1.5),
    Bound("gpu", "bulk-2048", "fp16", TORCHS_BEST, 1.2, target=1.5),
    Bound("gpu", "stages-image", "fp16", "device_ms", 4.0, target=2.5),
    Bound("gpu", "stages-text", "fp16", "device_ms", 1.2, target=0.7),
    Bound("server", "serve-texts", "int8", "ClipModel int8, one a call", 1.5),
    Bound("server", "serve-images", "int8", "ClipModel int8, all in a call", 0.9),
)
