"""Certificates: the error bounds of each precision, and the verdict on measured errors.

`jinaclip certify` measures the errors and writes `certificates/<precision>-<backend>-<device>.json` to the bundle or
the cache directory. docs/bundle.md describes the fields. precision="auto" uses a certified precision only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinaclip.bundle.files import safe_name

FORMAT_VERSION = 1
MIN_ITEMS = {"text": 1000, "image": 200}  # by tower; a certificate measured on fewer is indicative


@dataclass(frozen=True)
class Bounds:
    """Error bounds of one precision. None means that there is no bound.

    Attributes:
        max_abs: largest allowed difference from torch in a component of a unit vector, at every dim.
        cosine: smallest allowed cosine similarity to the reference vector, at every dim.
        batch_max_abs, batch_cosine: the same bounds for a vector computed alone and in a batch with an outlier.
        known_answers: largest allowed difference from the published cosine similarities. Applies to the published
            weights.
    """

    max_abs: float | None = None
    cosine: float | None = None
    batch_max_abs: float | None = None
    batch_cosine: float | None = None
    known_answers: float | None = None


BOUNDS = {
    "fp32": Bounds(max_abs=1e-5, batch_max_abs=1e-6, known_answers=5e-3),
    "fp16": Bounds(cosine=0.9999, batch_cosine=0.99999, known_answers=5e-3),
    "int8": Bounds(cosine=0.995, batch_cosine=0.9999),
}


def note_name(precision: str, facts: Mapping[str, Any]) -> str:
    """The certificate's path, relative to the bundle.

    Args:
        precision: the certified precision.
        facts: the backend's `facts`.
    """
    return f"certificates/{safe_name('-'.join((precision, facts['backend'], facts['device'])))}.json"


def verdict_of(precision: str, tower: str, measured: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Compare one tower's measured errors with the bounds.

    Args:
        precision: the measured precision.
        tower: the measured tower.
        measured: the tower's entry in a certificate. If the measurement failed, it has `error` and no numbers. Without
            `reference`, the vectors were not compared with torch.

    Returns:
        "passed", "failed" or "indicative", and the reasons if it is not "passed".
    """
    if "error" in measured:
        return "failed", [measured["error"]]
    bounds, reasons = BOUNDS[precision], []

    def hold(what: str, found: float, *, least: float | None = None, most: float | None = None) -> None:
        if least is not None and not found >= least:  # true for NaN, too
            reasons.append(f"{what} is {found:.7g}, expected at least {least:.7g}")
        if most is not None and not found <= most:
            reasons.append(f"{what} is {found:.2g}, expected at most {most:.2g}")

    for dim, numbers in measured.get("dims", {}).items():
        hold(f"cosine at dim {dim}", numbers["cosine"]["min"], least=bounds.cosine)
        hold(f"largest error at dim {dim}", numbers["max_abs"], most=bounds.max_abs)
    batch = measured["batch"]
    hold("error in a batch with another item", batch["max_abs"], most=bounds.batch_max_abs)
    hold("cosine in a batch with another item", batch["cosine"], least=bounds.batch_cosine)
    if "known_answers" in measured:
        hold("error of the known answers", measured["known_answers"]["max_error"], most=bounds.known_answers)
    if reasons:
        return "failed", reasons
    if measured.get("reference") is None:
        reasons.append("fp32 was not compared with torch; pass --against CHECKPOINT")
    if measured["items"] < MIN_ITEMS[tower]:
        reasons.append(f"measured on {measured['items']} different {tower}s, expected at least {MIN_ITEMS[tower]}")
    return ("indicative" if reasons else "passed"), reasons
