"""What a precision must hold to be certified, and which one "auto" may therefore take.

`jinaclip certify` measures and writes `certificates/<precision>-<backend>-<device>.json` beside the bundle;
docs/bundle.md has its fields. Here are the bounds, the verdict, and the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinaclip.backends import Place
from jinaclip.bundle import Bundle, safe_name
from jinaclip.errors import BackendError

FORMAT_VERSION = 1
MIN_ITEMS = 100  # of a tower; with fewer a certificate is indicative

# What "auto" considers before fp32, fastest first, by device. fp16 is no faster on a CPU, int8 has no GPU kernels here.
FASTER = {"cpu": ("int8",), "cuda": ("fp16",)}


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


@dataclass(frozen=True)
class Choice:
    """What "auto" stands for.

    Attributes:
        precision: to be taken.
        reason: why it is that one.
        lapsed: a faster one is certified for this tower, but not for what would run here: vectors and provenance are
            others than where the certificate holds.
    """

    precision: str
    reason: str
    lapsed: bool = False


def choose_precision(bundle: Bundle, tower: str, place: Place) -> Choice:
    """The precision that "auto" stands for.

    Args:
        place: what would run the graph. A certificate holds where its `facts` are the same: other kernels round
            differently.

    Raises:
        BackendError: the place runs no fp32 graph, and nothing else is certified.
    """
    reason, lapsed = "the bundle has no faster graph", False
    facts, possible = place.facts(), place.precisions(bundle, tower)
    for precision in FASTER.get(place.device, ()):
        if precision in possible:
            certificate = bundle.read_note(note_name(precision, facts))
            problem = _objection(certificate, bundle, tower, precision, place)
            if problem is None:
                return Choice(precision, f"the {precision} certificate passed")
            reason = f"{precision}: {problem}"
            lapsed = _passed(certificate, tower)
    if "fp32" not in possible:
        raise BackendError(
            f"precision 'auto': {place.backend} runs no fp32 graph of the {tower} tower, and {reason}; ask for "
            "precision='fp16', or run `jinaclip certify` with this backend first"
        )
    return Choice("fp32", reason, lapsed)


def _passed(certificate: Mapping[str, Any] | None, tower: str) -> bool:
    """Whether it says so of this tower, of whatever graph on whatever machine."""
    towers = (certificate or {}).get("towers")
    measured = towers.get(tower) if isinstance(towers, dict) else None
    return isinstance(measured, dict) and measured.get("verdict") == "passed"


def _objection(
    certificate: Mapping[str, Any] | None, bundle: Bundle, tower: str, precision: str, place: Place
) -> str | None:
    """Why a certificate does not speak for this graph here; None if it does."""
    if certificate is None:
        return "no certificate"
    if certificate.get("format_version") != FORMAT_VERSION:
        return f"certificate has format version {certificate.get('format_version')!r:.40}, expected {FORMAT_VERSION}"
    session, towers = certificate.get("session"), certificate.get("towers")
    if not isinstance(session, dict) or not isinstance(towers, dict) or certificate.get("precision") != precision:
        return "certificate is not as the format says"
    for name, value in place.facts().items():
        if session.get(name) != value:
            return f"certificate is of {name} {session.get(name)!r:.80}, this is {value!r}"
    measured = towers.get(tower)
    if not isinstance(measured, dict):
        return f"certificate does not cover the {tower} tower"
    if measured.get("graph") != place.graph(bundle, tower, precision):
        return "certificate is of another graph; run `jinaclip certify` after `jinaclip build`"
    if measured.get("verdict") != "passed":
        return f"certificate's verdict is {measured.get('verdict')!r:.40}"
    return None
