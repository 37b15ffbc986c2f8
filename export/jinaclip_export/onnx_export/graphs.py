"""Export each tower as a standard ONNX graph and compare the graph with torch.

The graphs contain every step from token ids or 8-bit pixels to a unit vector: mask, scaling, pooling and L2 norm.
docs/bundle.md describes their inputs and outputs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from jinaclip.backends.onnxruntime.cpu import OnnxRuntimeSession
from jinaclip.preprocessing.image import ImagePreprocessing
from jinaclip_export.errors import ExportError, ParityError
from jinaclip_export.towers.image import ImageTower
from jinaclip_export.towers.text import TextTower

OPSET = 23  # the first opset with the Attention operator
MAX_ERROR = 1e-5  # largest allowed difference of a component of a unit vector between graph and torch


class TextGraph(nn.Module):
    """input_ids int64 [B, T] -> text_embeddings [B, D], l2norm_text_embeddings [B, D]."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.tower(input_ids)
        return raw, unit_vectors(raw)


class ImageGraph(nn.Module):
    """pixel_values -> image_embeddings [B, D], l2norm_image_embeddings [B, D].

    pixels "uint8": pixel_values uint8 [B, S, S, 3], scaled and normalised by the graph.
    pixels "float32": pixel_values float32 [B, 3, S, S], normalised by the caller, as in the published file.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: ImageTower, preprocessing: ImagePreprocessing, pixels: str = "uint8") -> None:
        super().__init__()
        self.tower = tower
        self.pixels = pixels
        self.register_buffer("mean", torch.tensor(preprocessing.mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(preprocessing.std, dtype=torch.float32)[:, None, None])

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        if self.pixels == "uint8":
            scaled = pixel_values.float().permute(0, 3, 1, 2) / 255.0  # [B, 3, S, S]
            pixel_values = (scaled - self.mean) / self.std
        raw = self.tower(pixel_values)
        return raw, unit_vectors(raw)


def unit_vectors(x: Tensor) -> Tensor:
    """[B, D] -> x / max(norm, 1e-12). It does not use ReduceL2, whose CUDA kernel in ONNX Runtime needs cuDNN."""
    return x / (x * x).sum(-1, keepdim=True).sqrt().clamp(min=1e-12)


def export_text(tower: TextTower, path: Path) -> float:
    """Write the text graph and compare it with torch.

    Returns:
        The largest absolute difference between the unit vectors of the graph and of torch.

    Raises:
        ParityError: the difference is larger than MAX_ERROR.
        ExportError: the graph does not have one Attention node per block.
    """
    graph = TextGraph(tower)
    config = tower.config
    example = torch.full((2, 7), config.eos_token_id, dtype=torch.int64)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=1, max=config.max_tokens)},)
    _write(graph, example, shapes, "input_ids", "text", path)
    _require_attention(path, config.num_hidden_layers)
    longest = min(40, config.max_tokens)
    rng = np.random.default_rng(0)
    probes = []
    for lengths in ((1,), (2, 5), (longest, 1, 9)):
        ids = np.full((len(lengths), max(lengths)), config.pad_token_id, np.int64)
        for row, length in enumerate(lengths):
            drawn = rng.integers(0, config.vocab_size, length)
            ids[row, :length] = np.where(drawn == config.pad_token_id, config.eos_token_id, drawn)
        probes.append(ids)
    return _compare(graph, probes, "input_ids", "text", path)


def export_image(tower: ImageTower, preprocessing: ImagePreprocessing, pixels: str, path: Path) -> float:
    """Write the image graph and compare it with torch. Returns and raises the same as `export_text`."""
    graph = ImageGraph(tower, preprocessing, pixels)
    size = tower.config.image_size
    rng = np.random.default_rng(0)
    probes: list[np.ndarray] = [rng.integers(0, 256, (n, size, size, 3), np.uint8) for n in (2, 1)]
    if pixels == "float32":
        probes = [((p.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25).astype(np.float32) for p in probes]
    _write(graph, torch.from_numpy(probes[0]), ({0: torch.export.Dim("batch")},), "pixel_values", "image", path)
    _require_attention(path, tower.config.layers)
    return _compare(graph, probes, "pixel_values", "image", path)


def _write(graph: nn.Module, example: Tensor, shapes: Any, name: str, tower: str, path: Path) -> None:
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's deprecation warnings; _compare checks the result
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[name],
                output_names=[f"{tower}_embeddings", f"l2norm_{tower}_embeddings"],
                dynamic_shapes=shapes,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None  # dynamo=True always returns one
    model: Any = program.model
    # torch folds only the Transpose of a large weight. The four-dimensional patch weight is also reshaped.
    fold_constants(model, should_fold=lambda node: node.op_type in ("Reshape", "Transpose"))
    model.producer_name, model.producer_version = "jinaclip", None
    # Remove the source paths and stack traces that the exporter records on every node.
    for entry in (model, model.graph, *model.graph.all_nodes()):
        entry.metadata_props.clear()
        entry.doc_string = None
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    program.save(path, external_data=True)
    del program, model
    onnx.checker.check_model(str(path))


def _require_attention(path: Path, blocks: int) -> None:
    """Check that each block has one Attention node. Other forms are slow, and TensorRT cannot fuse them."""
    model = onnx.load(path, load_external_data=False)
    found = sum(node.op_type == "Attention" and not node.domain for node in model.graph.node)
    if found != blocks:
        raise ExportError(
            f"the exported graph has {found} Attention nodes, expected {blocks}, one per block; "
            f"this torch ({torch.__version__}) does not export scaled_dot_product_attention as tested"
        )


def _compare(graph: nn.Module, probes: Sequence[np.ndarray], name: str, tower: str, path: Path) -> float:
    session = OnnxRuntimeSession(path)
    worst = 0.0
    for probe in probes:
        with torch.inference_mode():
            expected = [t.numpy() for t in graph(torch.from_numpy(probe))]
        found = session.run({name: probe})
        unit = float(np.abs(found[f"l2norm_{tower}_embeddings"] - expected[1]).max())
        raw = found[f"{tower}_embeddings"] - expected[0]
        relative = float((np.linalg.norm(raw, axis=1) / np.linalg.norm(expected[0], axis=1)).max())
        error = max(unit, relative / np.sqrt(raw.shape[1]))
        if not error <= MAX_ERROR:  # true for NaN too
            raise ParityError(
                f"the {tower} graph differs from torch by {error:.1e} on unit vectors (input shape "
                f"{list(probe.shape)}), expected at most {MAX_ERROR:.0e}; nothing was written"
            )
        worst = max(worst, error)
    return worst
