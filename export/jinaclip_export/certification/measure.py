"""Run a bundle's graphs on real inputs and make certificates from the results.

Every item is run alone. A sample of the items is run again in a batch with an outlier. The reference of a precision is
the bundle's fp32 graph. The reference of fp32 is torch, if a checkpoint is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from jinaclip.backends.base import Backend
from jinaclip.bundle.certificates import FORMAT_VERSION, note_name, verdict_of
from jinaclip.bundle.manifest import Bundle
from jinaclip.encoders import ENCODERS, Encoder, TextEncoder
from jinaclip.errors import BackendError, BackendMissing, EngineMismatch, InputError
from jinaclip.preprocessing.image import preprocess
from jinaclip.preprocessing.text import TextTokenizer, instruction_of
from jinaclip.terminal import progress
from jinaclip_export.certification.inputs import Items
from jinaclip_export.certification.known_answers import TEXTS, compare_known_answers
from jinaclip_export.certification.metrics import beside, compare, unit
from jinaclip_export.checkpoint.hub import PUBLISHED_SHA256

BESIDE = {"text": 24, "image": 8}  # number of items that are run again in a batch with an outlier
OUTLIER_TEXT = "\U0001f600龘 ¶¶¶ ZZZZ " * 40 + "0" * 200  # rare tokens, and longer than any other item


@dataclass(frozen=True)
class Vectors:
    """The output of one graph, raw float32.

    Attributes:
        alone: vectors of all items, each run alone [N, D].
        beside: vectors of the items `sample`, each run in a batch with an outlier [S, D].
        sample: indexes of the items in `beside`.
        known: vectors of the known answers' texts [10, D]; only for the text tower of the published weights.
        dims: lengths that a vector may be truncated to.
        session: description of the session that ran the graph.
    """

    alone: np.ndarray
    beside: np.ndarray
    sample: Sequence[int]
    known: np.ndarray | None
    dims: Sequence[int]
    session: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
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


class TowerInputs:
    """The items of one tower as graph inputs, computed on demand because image inputs are large."""

    def __init__(self, bundle: Bundle, tower: str, items: Items) -> None:
        self.bundle, self.tower, self.items = bundle, tower, items
        self.tokenizer: TextTokenizer | None = None
        if tower == "text":
            self.tokenizer = bundle.open_tokenizer()

    def __len__(self) -> int:
        return len(self.items.items)

    def row(self, index: int) -> np.ndarray:
        """One item: int64 [1, T], or pixels uint8 [1, size, size, 3]."""
        item = self.items.items[index]
        if self.tokenizer is not None:
            return self.text(instruction_of(None, self.bundle.tasks, self.bundle.default_task) + str(item))
        try:
            return preprocess(item, self.bundle.preprocessing)[None]
        except InputError as error:
            raise InputError(f"image {index}: {error}", index=index) from error

    def text(self, text: str) -> np.ndarray:
        """Token ids int64 [1, T] of a text, without an instruction."""
        assert self.tokenizer is not None  # only called for the text tower
        ids = self.tokenizer.encode([text])
        return self.tokenizer.padded(self.tokenizer.truncated(ids, self.bundle.max_tokens))

    def beside_outlier(self, index: int) -> np.ndarray:
        """A batch of two: an item, then a long text of rare characters or an image of black and white noise."""
        row = self.row(index)
        if self.tokenizer is not None:
            outlier = self.tokenizer.encode([OUTLIER_TEXT])[0][: self.bundle.max_tokens]
            return self.tokenizer.padded([row[0].tolist(), outlier])
        size = self.bundle.preprocessing.size
        noise = np.random.default_rng(0).integers(0, 2, (1, size, size, 3), np.uint8) * np.uint8(255)
        return np.concatenate([row, noise])


def run_graph(inputs: TowerInputs, precision: str, backend: Backend, threads: int | None) -> Vectors:
    """Run one graph with a backend and return every vector that its certificate needs.

    Raises:
        BackendError: the graph failed its self-test, or returned NaN or infinity.
        InputError: an item is invalid.
    """
    bundle, tower = inputs.bundle, inputs.tower
    session, _ = backend.open(bundle, tower, precision, threads=threads)
    try:
        encoder = ENCODERS[tower](bundle, precision, session)
        encoder.check(always=True)
        sample = np.unique(np.linspace(0, len(inputs) - 1, BESIDE[tower]).astype(int)).tolist()
        advance = progress(f"{precision} {tower}", len(inputs) + len(sample))

        def run(batches: Iterator[np.ndarray]) -> np.ndarray:
            rows = []
            for batch in batches:
                rows.append(_first_row(encoder, batch))
                advance(1)
            unit(found := np.stack(rows), max(bundle.dims))  # raises if a value is not finite
            return found

        return Vectors(
            alone=run(inputs.row(i) for i in range(len(inputs))),
            beside=run(inputs.beside_outlier(i) for i in sample),
            sample=sample,
            known=_known_answers(inputs, encoder),
            dims=bundle.dims,
            session=session.describe(),
        )
    finally:
        session.close()


def _known_answers(inputs: TowerInputs, encoder: Encoder) -> np.ndarray | None:
    if inputs.tower != "text" or inputs.bundle.model["weights_sha256"] != PUBLISHED_SHA256:
        return None
    return np.stack([_first_row(encoder, inputs.text(text)) for text in TEXTS])


def _first_row(encoder: Encoder, batch: np.ndarray) -> np.ndarray:
    vectors = encoder.run_padded(batch) if isinstance(encoder, TextEncoder) else encoder.run(batch)
    row: np.ndarray = vectors[0]
    return row


def try_graph(inputs: TowerInputs, precision: str, backend: Backend, threads: int | None) -> Vectors | str:
    """Result of `run_graph`, or the reason why the graph could not be measured."""
    try:
        return run_graph(inputs, precision, backend, threads)
    except (BackendMissing, EngineMismatch):
        raise
    except BackendError as error:
        return str(error)


def certificate(
    bundle: Bundle, measured: Measured, inputs: Mapping[str, TowerInputs], backend: Backend, session: Mapping[str, Any]
) -> dict[str, Any]:
    """The certificate of one precision; docs/bundle.md describes its fields.

    Args:
        backend: the backend that ran the graphs.
        session: description of the session that ran them.
    """
    towers = {}
    for tower, vectors in measured.found.items():
        entry: dict[str, Any] = {
            "graph": backend.graph(bundle, tower, measured.precision),
            "items": len(inputs[tower]),
            "source": inputs[tower].items.source,
        }
        entry |= {"error": vectors} if isinstance(vectors, str) else _numbers(bundle, measured, tower, vectors)
        entry["verdict"], entry["reasons"] = verdict_of(measured.precision, entry)
        towers[tower] = entry
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).date().isoformat(),
        "model": bundle.model["id"],
        "weights_sha256": bundle.model["weights_sha256"],
        "precision": measured.precision,
        "session": {name: value for name, value in session.items() if name != "graph"},  # it is in each tower's entry
        "passed": all(entry["verdict"] == "passed" for entry in towers.values()),
        "towers": towers,
    }


def _numbers(bundle: Bundle, measured: Measured, tower: str, vectors: Vectors) -> dict[str, Any]:
    """The fields of a tower's entry that are computed from its vectors."""
    numbers: dict[str, Any] = {"reference": None}
    if tower in measured.references:
        numbers["reference"] = measured.reference_name or f"fp32 graph {bundle.graph_identity(tower, 'fp32')}"
        other = "image" if tower == "text" else "text"
        theirs, across = measured.found.get(other), None
        if isinstance(theirs, Vectors) and other in measured.references:
            across = (theirs.alone, measured.references[other])
        numbers["dims"] = {
            str(dim): compare(vectors.alone, measured.references[tower], dim, across=across) for dim in bundle.dims
        }
    sample = list(vectors.sample)
    numbers["batch"] = {"items": len(sample), **beside(vectors.alone[sample], vectors.beside, bundle.dims)}
    if vectors.known is not None:
        numbers["known_answers"] = compare_known_answers(unit(vectors.known, max(bundle.dims)))
    return numbers


def with_other_towers(fresh: dict[str, Any], bundle: Bundle, backend: Backend) -> dict[str, Any]:
    """The new certificate, with the entries of towers that were not measured this time copied from the old one."""
    old = bundle.read_note(note_name(fresh["precision"], fresh["session"])) or {}
    session, towers = old.get("session"), old.get("towers")
    if (
        old.get("format_version") != FORMAT_VERSION
        or not isinstance(session, dict)
        or not isinstance(towers, dict)
        or any(session.get(name) != value for name, value in backend.facts().items())
    ):
        return fresh
    kept = {
        tower: entry
        for tower, entry in towers.items()
        if tower in bundle.towers
        and tower not in fresh["towers"]
        and fresh["precision"] in bundle.tower(tower).graphs
        and isinstance(entry, dict)
        and entry.get("graph") == _graph_now(bundle, tower, fresh["precision"], backend)
    }
    whole = fresh | {"towers": fresh["towers"] | kept}
    return whole | {"passed": all(entry.get("verdict") == "passed" for entry in whole["towers"].values())}


def _graph_now(bundle: Bundle, tower: str, precision: str, backend: Backend) -> str | None:
    """Identity of the graph that would run now, or None if there is no engine."""
    try:
        return backend.graph(bundle, tower, precision)
    except BackendError:
        return None
