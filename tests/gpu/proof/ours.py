"""Our side, in each way that a graph is prepared: over jinaclip's own CUDA operators, and over ONNX Runtime's alone.

A way that turns out wrong is written down, and later parts leave it out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from jinaclip.backends.base import Session
from jinaclip.backends.cuda.gpu import gpu
from jinaclip.backends.onnxruntime.cuda import OnnxRuntimeCudaSession
from jinaclip.backends.onnxruntime.cuda_operators import VARIABLE
from jinaclip.backends.onnxruntime.prepared_graphs import find_prepared
from jinaclip.bundle.manifest import Bundle, TowerManifest
from tests.gpu.proof.context import Context
from tests.gpu.proof.kit import OPERATORS

OWN, PLAIN = "jinaclip operators", "jinaclip plain"


def ways(context: Context) -> dict[str, Path | None]:
    """By name: the library of operators, None without; those that were found wrong left out."""
    library = context.work / "kit" / OPERATORS
    found: dict[str, Path | None] = {OWN: library, PLAIN: None} if library.is_file() else {PLAIN: None}
    return {name: path for name, path in found.items() if not _mark(context, name).exists()}


def leave_out(context: Context, way: str, reason: str) -> None:
    """Later parts do without it."""
    context.record(f"{way} left out", reason=reason[:300])
    _mark(context, way).write_text(reason, "utf-8")


def choose(library: Path | None) -> None:
    """For ClipModel and `jinaclip build` in this process and those that it starts."""
    os.environ[VARIABLE] = "" if library is None else str(library)


def open_session(bundle: Bundle, tower: str, library: Path | None) -> OnnxRuntimeCudaSession:
    """A session of the graph that `jinaclip build --device cuda` prepared."""
    found, reason = find_prepared(bundle, tower, "fp16", "cuda", operators=library is not None)
    if found is None or found.operators != (library is not None):
        raise RuntimeError(reason)
    pad = bundle.special_ids["pad"] if tower == "text" else 0
    return OnnxRuntimeCudaSession(found.path, gpu=gpu(), prepared=found.key, pad=pad, operators=library)


def open_all(context: Context, bundle: Bundle, tower: str, stack: ExitStack) -> dict[str, OurSide]:
    """The side of every way that opens and runs."""
    sides = {}
    for way, library in ways(context).items():
        try:
            session = stack.enter_context(closing(open_session(bundle, tower, library)))
            sides[way] = OurSide(session, bundle.tower(tower))
        except Exception as error:  # the others can be measured all the same
            context.record(f"{way} does not open", error=f"{type(error).__name__}: {error}"[:500])
    return sides


class OurSide:
    """A session: ids or pixels of the host to unit vectors of the host."""

    def __init__(self, session: Session, tower: TowerManifest) -> None:
        self.cost = session.cost
        self._session, self._tower = session, tower

    def __call__(self, values: np.ndarray) -> np.ndarray:
        output = f"l2norm_{self._tower.name}_embeddings"
        return self._session.run({self._tower.input_name: values}, outputs=[output])[output]

    def many(self, batches: Sequence[np.ndarray], places: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Vectors of several batches, as many at once as the session gains from: as ClipModel does it.

        Args:
            places: of each batch, which rows of the result are its own; None: one batch after the other.
        """
        if places is None:
            ends = np.cumsum([len(batch) for batch in batches])
            places = [np.arange(end - len(batch), end) for end, batch in zip(ends, batches, strict=True)]
        result = np.empty((0, 0), np.float32)
        with ThreadPoolExecutor(self._session.concurrency) as pool:
            for rows, vectors in zip(places, pool.map(self, batches), strict=True):
                if not result.size:
                    result = np.empty((sum(map(len, places)), vectors.shape[1]), np.float32)
                result[rows] = vectors
        return result


def _mark(context: Context, way: str) -> Path:
    return context.work / f"wrong-{way.replace(' ', '-')}"


def clear_marks(context: Context) -> None:
    """Every way counts as right again."""
    for path in context.work.glob("wrong-*"):
        path.unlink(missing_ok=True)
