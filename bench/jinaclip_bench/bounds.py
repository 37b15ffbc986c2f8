"""What the figures must hold, ratio by ratio, and whether those of a run do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jinaclip_bench.measure import ours


@dataclass(frozen=True)
class Bound:
    """One bound on a median.

    Attributes:
        suite: whose table it stands in.
        case: a name of jinaclip_bench.cases.CASES.
        precision: of our side.
        over: the side whose time ÷ ours is at least `limit`; None where our memory above load is at most `limit` MiB.
        limit: see `over`.
    """

    suite: str
    case: str
    precision: str
    over: str | None
    limit: float

    @property
    def what(self) -> str:
        """What is bounded, in words."""
        return f"{self.over} ÷ {ours(self.precision)}" if self.over else f"{ours(self.precision)}, MiB above load"

    def measured(self, records: Iterable[Mapping[str, Any]]) -> Mapping[str, float] | None:
        """p50, p10 and p90 of a run; None where it was not measured."""
        mine = ours(self.precision)
        for record in records:
            if record["case"] == self.case and record["side"] == (self.over or mine):
                found: Mapping[str, float] | None = (
                    record["against"].get(mine) if self.over else record["above_load_mib"]
                )
                return found
        return None

    def holds(self, median: float) -> bool:
        """Whether a median keeps the bound."""
        return median >= self.limit if self.over else median <= self.limit


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
    Bound("cpu", "text-8192", "fp32", None, 2048.0),
    Bound("cpu", "text-8192", "int8", None, 2048.0),
)
