"""Reference vectors of the fp32 graphs: torch's eager fp32 towers, for `jinaclip certify --against`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from jinaclip.bundle.manifest import Bundle
from jinaclip_export.checkpoint.reader import Checkpoint
from jinaclip_export.errors import CertificationError
from jinaclip_export.onnx_export.graphs import ImageGraph, TextGraph

REFERENCE = f"torch {torch.__version__.partition('+')[0]}"


def open_checkpoint(directory: str, bundle: Bundle) -> Checkpoint:
    """Open the checkpoint that a bundle was made from.

    Raises:
        CheckpointError: the directory is not a valid checkpoint.
        CertificationError: the checkpoint's weights are not those of the bundle.
    """
    checkpoint = Checkpoint(Path(directory), bundle.model.get("adaptation"))
    found, expected = checkpoint.weights_sha256(), bundle.model["weights_sha256"]
    if found != expected:
        raise CertificationError(
            f"--against {directory} has weights {found[:16]}…, the bundle was made from {expected[:16]}…; "
            "use the checkpoint that was exported"
        )
    return checkpoint


def torch_vectors(checkpoint: Checkpoint, bundle: Bundle, tower: str, rows: Iterable[np.ndarray]) -> np.ndarray:
    """Raw vectors [N, D] of N rows of one item each: ids int64 [1, T], or pixels uint8 [1, size, size, 3]."""
    graph: TextGraph | ImageGraph
    if tower == "text":
        graph = TextGraph(checkpoint.text_tower())
    else:
        graph = ImageGraph(checkpoint.image_tower(), bundle.preprocessing, bundle.tower("image").input_dtype)
        rows = map(bundle.image_input, rows)
    with torch.inference_mode():
        return np.concatenate([graph(torch.from_numpy(row))[0].numpy() for row in rows])
