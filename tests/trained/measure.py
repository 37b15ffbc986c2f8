"""Compare a mapped model with its reference, and measure every graph of its bundle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu
from jinaclip.bundle.manifest import Bundle
from jinaclip.preprocessing.image import normalise, preprocess
from jinaclip.preprocessing.text import instruction_of
from jinaclip_engines.onnxruntime.prepare import PREPARED_PRECISIONS, prepare
from jinaclip_export.bundle.manifest import Identity
from jinaclip_export.bundle.writer import export_bundle
from jinaclip_export.certification.inputs import Items
from jinaclip_export.certification.measure import Measurement, certificate, run_graph
from jinaclip_export.certification.metrics import shared_neighbours, unit
from jinaclip_export.certification.torch_reference import TorchReference, torch_vectors
from jinaclip_export.onnx_export.graphs import MAX_ERROR
from tests.trained.bert import Reference
from tests.trained.mapped import MappedModel

PRECISIONS = ("fp32", "fp16", "int8")
COMPARED = 64  # number of items that are compared with the reference
BATCH = 8


def measure(
    model: MappedModel, reference: Reference, items: Items, scratch: Path, threads: int | None
) -> dict[str, Any]:
    """Export the model and measure its graphs: the three of the bundle, then those prepared for this CPU.

    Returns:
        `tower`, `reference_error`, `precisions` (what the manifest has about fp16 and int8), and `graphs`: the
        certificate of each graph as `jinaclip certify` writes it, but with torch as the reference of every precision.
        A certificate also has `prepared`, and `standard_error`: the standard error of `top10` by dim.
    """
    export_bundle(model, scratch / "bundle", identity=Identity(model.name), towers=[model.tower], precisions=PRECISIONS)
    bundle, tower = Bundle(scratch / "bundle"), model.tower
    error = reference_error(model, bundle, items, reference)
    expected = torch_vectors(model, bundle, tower, items)
    graphs = [_measure_graph(bundle, tower, items, precision, expected, threads) for precision in PRECISIONS]
    for precision in PREPARED_PRECISIONS["cpu"]:
        prepare(bundle, tower, precision)
        graphs.append(_measure_graph(bundle, tower, items, precision, expected, threads))
    lowered = {
        precision: entry for precision, entry in bundle.manifest["precisions"][tower].items() if precision in PRECISIONS
    }
    return {"tower": tower, "reference_error": error, "precisions": lowered, "graphs": graphs}


def reference_error(model: MappedModel, bundle: Bundle, items: Items, reference: Reference) -> float:
    """Largest difference of a component between unit vectors of the tower and of its reference.

    Raises:
        AssertionError: the difference is larger than MAX_ERROR, which the export allows between a graph and torch. Both
            sides compute in float32 and differ by about 1e-7. A wrong mapping differs by more than 1e-3.
    """
    tower = model.text_tower() if model.tower == "text" else model.image_tower()
    chosen = np.unique(np.linspace(0, len(items) - 1, COMPARED).astype(int)).tolist()
    worst = 0.0
    for start in range(0, len(chosen), BATCH):
        inputs = _tower_input(bundle, model.tower, [items.items[index] for index in chosen[start : start + BATCH]])
        with torch.inference_mode():
            found, expected = (F.normalize(side(inputs), dim=-1) for side in (tower, reference))
        worst = max(worst, float((found - expected).abs().max()))
    assert worst <= MAX_ERROR, f"{model.name} differs from its reference by {worst:.1e}, expected at most {MAX_ERROR}"
    return worst


def _tower_input(bundle: Bundle, tower: str, items: Sequence[Any]) -> Tensor:
    """A batch of texts as padded token ids, or of images as normalised pixels."""
    if tower == "image":
        pixels = np.stack([preprocess(item, bundle.preprocessing) for item in items])
        return torch.from_numpy(normalise(pixels, bundle.preprocessing))
    tokenizer = bundle.open_tokenizer()
    instruction = instruction_of(None, bundle.tasks, bundle.default_task)
    return torch.from_numpy(tokenizer.padded(tokenizer.encode(items, instruction=instruction)))


def _measure_graph(
    bundle: Bundle, tower: str, items: Items, precision: str, expected: np.ndarray, threads: int | None
) -> dict[str, Any]:
    backend = OnnxRuntimeCpu()
    vectors = run_graph(bundle, tower, items, precision, backend, threads)
    measurement = Measurement(precision, {tower: vectors}, {tower: expected}, TorchReference.name)
    whole = certificate(bundle, measurement, {tower: items}, backend, vectors.session)
    errors = {}
    for dim in bundle.dims:
        found, reference = unit(vectors.alone, dim), unit(expected, dim)
        shares = shared_neighbours(found, found, reference, reference, same_set=True)
        errors[str(dim)] = float(shares.std(ddof=1)) / math.sqrt(len(shares))
    return whole | {"prepared": vectors.session["graph"] != "standard", "standard_error": errors}
