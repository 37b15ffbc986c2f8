"""Run a bundle's graphs on real inputs and make certificates from the results.

Texts with equal token ids and images with equal pixels count once. Every item is run alone. A sample of the items is
run again in a batch with an outlier. The reference of a precision is the bundle's fp32 graph. The reference of fp32 is
torch, if a checkpoint is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np

from jinaclip.backends.base import Backend, Session
from jinaclip.bundle.certificates import FORMAT_VERSION, MIN_ITEMS, note_name, verdict_of
from jinaclip.bundle.engines import difference
from jinaclip.bundle.manifest import Bundle
from jinaclip.encoders import ENCODERS, Encoder, TextEncoder
from jinaclip.errors import BackendError, BackendMissing, EngineMismatch, InputError
from jinaclip.terminal import progress
from jinaclip_export.certification.inputs import Items
from jinaclip_export.certification.known_answers import TEXTS, compare_known_answers
from jinaclip_export.certification.metrics import batch_effect, compare, unit
from jinaclip_export.checkpoint.hub import PUBLISHED_SHA256

BATCHED = {"text": 24, "image": 8}  # number of items that are run again in a batch with an outlier
OUTLIER_TEXT = "\U0001f600龘 ¶¶¶ ZZZZ " * 40 + "0" * 200  # rare tokens, and longer than any other item


@dataclass(frozen=True)
class Vectors:
    """The output of one graph, raw float32.

    Attributes:
        alone: vectors of all items, each run alone [N, D].
        batched: vectors of the items `sample`, each run in a batch with an outlier [S, D].
        sample: indexes of the items in `batched`.
        known: vectors of the known answers' texts [10, D]; only for the text tower of the published weights.
        dims: lengths that a vector may be truncated to.
        session: description of the session that ran the graph.
    """

    alone: np.ndarray
    batched: np.ndarray
    sample: Sequence[int]
    known: np.ndarray | None
    dims: Sequence[int]
    session: Mapping[str, Any]


@dataclass(frozen=True)
class Measurement:
    """The measurement of one precision of a bundle.

    Attributes:
        found: the vectors of each tower, or the reason why there are none.
        references: raw reference vectors [N, D] of each tower. Without them only the effect of batches is measured.
        reference_name: name of what computed the references; None for the bundle's fp32 graphs.
    """

    precision: str
    found: Mapping[str, Vectors | str]
    references: Mapping[str, np.ndarray]
    reference_name: str | None = None


def without_duplicates(bundle: Bundle, tower: str, items: Items) -> Items:
    """The items without those that are equal to an earlier one for the graph: in token ids, or in pixels.

    Raises:
        InputError: an item is invalid, or fewer than two are different.
    """
    encoder = ENCODERS[tower](bundle, "fp32", cast(Session, None))  # preparing items needs no session
    different: dict[bytes, Any] = {}
    advance = progress(f"read {tower}s", len(items))
    for index, item in enumerate(items.items):
        prepared = np.asarray(_prepared(encoder, item, index))
        different.setdefault(hashlib.sha256(prepared.tobytes()).digest(), item)
        advance(1)
    if len(different) < 2:
        expected = f"expected at least 2 (a certificate needs {MIN_ITEMS[tower]})"
        raise InputError(f"--{tower}s has {len(different)} different {tower}s, {expected}")
    return Items(list(different.values()), items.source)


def run_graph(
    bundle: Bundle, tower: str, items: Items, precision: str, backend: Backend, threads: int | None
) -> Vectors:
    """Run one graph with a backend and return every vector that its certificate needs.

    Raises:
        BackendError: the graph failed its self-test, or returned NaN or infinity.
        InputError: an item is invalid.
    """
    session, _ = backend.open(bundle, tower, precision, threads=threads)
    with closing(session):
        encoder = ENCODERS[tower](bundle, precision, session)
        encoder.check()
        sample = np.unique(np.linspace(0, len(items) - 1, BATCHED[tower]).astype(int)).tolist()
        advance = progress(f"{precision} {tower}", len(items) + len(sample))
        return Vectors(
            alone=run_items(encoder, items, range(len(items)), advance=advance),
            batched=run_items(encoder, items, sample, outlier=_outlier(encoder), advance=advance),
            sample=sample,
            known=_known_answers(encoder),
            dims=bundle.dims,
            session=session.describe(),
        )


def try_graph(
    bundle: Bundle, tower: str, items: Items, precision: str, backend: Backend, threads: int | None
) -> Vectors | str:
    """Result of `run_graph`, or the reason why the graph could not be measured."""
    try:
        return run_graph(bundle, tower, items, precision, backend, threads)
    except (BackendMissing, EngineMismatch):
        raise
    except BackendError as error:
        return str(error)


def run_items(
    encoder: Encoder,
    items: Items,
    indexes: Iterable[int],
    *,
    outlier: Any = None,
    advance: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Raw vectors [N, D] of items, each run alone or, with an outlier, in a batch of two.

    Args:
        encoder: the encoder that runs them.
        items: the items.
        indexes: indexes of the items to run.
        outlier: a prepared item that is put after each item; None for no batch.
        advance: called with 1 after each item.

    Raises:
        BackendError: a vector has NaN or infinity.
        InputError: an item is invalid.
    """
    rows = []
    for index in indexes:
        item = _prepared(encoder, items.items[index], index)
        rows.append(encoder.run([item] if outlier is None else [item, outlier])[0])
        if advance is not None:
            advance(1)
    unit(found := np.stack(rows), max(encoder.bundle.dims))  # raises if a value is not finite
    return found


def _prepared(encoder: Encoder, item: Any, index: int) -> Any:
    """The token ids of a text, or the pixels of an image."""
    if isinstance(encoder, TextEncoder):
        return encoder.prepare([item], max_length=encoder.bundle.max_tokens)[0]
    try:
        return encoder.prepare(item)
    except InputError as error:
        raise InputError(f"image {index}: {error}", index=index) from error


def _outlier(encoder: Encoder) -> Any:
    """The token ids of a long text of rare characters, or the pixels of black and white noise."""
    if isinstance(encoder, TextEncoder):
        return encoder.tokenizer.encode([OUTLIER_TEXT])[0][: encoder.bundle.max_tokens]
    size = encoder.bundle.preprocessing.size
    return np.random.default_rng(0).integers(0, 2, (size, size, 3), np.uint8) * np.uint8(255)


def _known_answers(encoder: Encoder) -> np.ndarray | None:
    if not isinstance(encoder, TextEncoder) or encoder.bundle.model["weights_sha256"] != PUBLISHED_SHA256:
        return None
    return np.concatenate([encoder.run([ids]) for ids in encoder.tokenizer.encode(TEXTS)])


def certificate(
    bundle: Bundle, measurement: Measurement, items: Mapping[str, Items], backend: Backend, session: Mapping[str, Any]
) -> dict[str, Any]:
    """The certificate of one precision; docs/bundle.md describes its fields.

    Args:
        items: the items of each tower.
        backend: the backend that ran the graphs.
        session: description of the session that ran them.
    """
    towers = {}
    for tower, vectors in measurement.found.items():
        entry: dict[str, Any] = {
            "graph": backend.graph(bundle, tower, measurement.precision),
            "items": len(items[tower]),
            "source": items[tower].source,
        }
        entry |= {"error": vectors} if isinstance(vectors, str) else _numbers(bundle, measurement, tower, vectors)
        entry["verdict"], entry["reasons"] = verdict_of(measurement.precision, tower, entry)
        towers[tower] = entry
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).date().isoformat(),
        "model": bundle.model["id"],
        "weights_sha256": bundle.model["weights_sha256"],
        "precision": measurement.precision,
        "session": {name: value for name, value in session.items() if name != "graph"},  # it is in each tower's entry
        "passed": all(entry["verdict"] == "passed" for entry in towers.values()),
        "towers": towers,
    }


def _numbers(bundle: Bundle, measurement: Measurement, tower: str, vectors: Vectors) -> dict[str, Any]:
    """The fields of a tower's entry that are computed from its vectors."""
    numbers: dict[str, Any] = {"reference": None}
    if tower in measurement.references:
        numbers["reference"] = measurement.reference_name or f"fp32 graph {bundle.graph_identity(tower, 'fp32')}"
        other = "image" if tower == "text" else "text"
        theirs, across = measurement.found.get(other), None
        if isinstance(theirs, Vectors) and other in measurement.references:
            across = (theirs.alone, measurement.references[other])
        numbers["dims"] = {
            str(dim): compare(vectors.alone, measurement.references[tower], dim, across=across) for dim in bundle.dims
        }
    sample = list(vectors.sample)
    numbers["batch"] = {"items": len(sample), **batch_effect(vectors.alone[sample], vectors.batched, bundle.dims)}
    if vectors.known is not None:
        numbers["known_answers"] = compare_known_answers(unit(vectors.known, max(bundle.dims)))
    return numbers


def with_other_towers(fresh: dict[str, Any], bundle: Bundle, backend: Backend) -> dict[str, Any]:
    """The new certificate, with the entries of towers that were not measured this time copied from the old one."""
    old = bundle.read_note(note_name(fresh["precision"], fresh["session"])) or {}
    session, towers = old.get("session"), old.get("towers")
    if old.get("format_version") != FORMAT_VERSION or not isinstance(session, dict) or not isinstance(towers, dict):
        return fresh
    if difference(session, backend.facts()) is not None:
        return fresh
    valid = {
        tower: entry
        for tower, entry in towers.items()
        if tower in bundle.towers
        and tower not in fresh["towers"]
        and fresh["precision"] in bundle.tower(tower).graphs
        and isinstance(entry, dict)
        and entry.get("graph") == _graph_now(bundle, tower, fresh["precision"], backend)
    }
    whole = fresh | {"towers": fresh["towers"] | valid}
    return whole | {"passed": all(entry.get("verdict") == "passed" for entry in whole["towers"].values())}


def _graph_now(bundle: Bundle, tower: str, precision: str, backend: Backend) -> str | None:
    """Identity of the graph that would run now, or None if there is no engine."""
    try:
        return backend.graph(bundle, tower, precision)
    except BackendError:
        return None
