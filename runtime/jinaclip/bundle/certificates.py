"""What a precision must hold to be certified, and which one "auto" may therefore take.

`jinaclip certify` measures and writes `certificates/<precision>-<backend>-<device>.json` beside the bundle;
docs/bundle.md has its fields. Here are the bounds, the verdict, and the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinaclip.bundle.files import safe_name

FORMAT_VERSION = 1
MIN_ITEMS = 100  # of a tower; with fewer a certificate is indicative


@dataclass(frozen=True)
class Bounds:
    """What one precision must hold; None is not asked of it.

    Attributes:
        max_abs: largest difference of a component of a unit vector from torch's, at every dim.
        cosine: smallest cosine with the reference's vector, at every dim.
        batch_max_abs, batch_cosine: the same of a vector computed beside an outlier and alone.
        known_answers: largest difference from a published cosine, of the published weights.
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
    """The certificate's file, relative to the bundle."""
    return f"certificates/{safe_name('-'.join((precision, facts['backend'], facts['device'])))}.json"


def verdict_of(precision: str, measured: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Hold one tower's numbers to the bounds.

    Args:
        measured: the tower's entry of a certificate. One that could not be measured has `error` and no numbers;
            one without `reference` was compared with nothing.

    Returns:
        "passed", "failed" or "indicative", and why it is not the first.
    """
    if "error" in measured:
        return "failed", [measured["error"]]
    bounds, reasons = BOUNDS[precision], []

    def hold(what: str, found: float, *, least: float | None = None, most: float | None = None) -> None:
        if least is not None and not found >= least:  # also when it is NaN
            reasons.append(f"{what} is {found:.7g}, expected at least {least:.7g}")
        if most is not None and not found <= most:
            reasons.append(f"{what} is {found:.2g}, expected at most {most:.2g}")

    for dim, numbers in measured.get("dims", {}).items():
        hold(f"cosine at dim {dim}", numbers["cosine"]["min"], least=bounds.cosine)
        hold(f"largest error at dim {dim}", numbers["max_abs"], most=bounds.max_abs)
    batch = measured["batch"]
    hold("error beside another item", batch["max_abs"], most=bounds.batch_max_abs)
    hold("cosine beside another item", batch["cosine"], least=bounds.batch_cosine)
    if "known_answers" in measured:
        hold("error of the known answers", measured["known_answers"]["max_error"], most=bounds.known_answers)
    if reasons:
        return "failed", reasons
    if measured.get("reference") is None:
        reasons.append("fp32 was not compared with torch: give --against CHECKPOINT")
    if measured["items"] < MIN_ITEMS:
        reasons.append(f"measured on {measured['items']} items, a certificate needs at least {MIN_ITEMS}")
    return ("indicative" if reasons else "passed"), reasons
