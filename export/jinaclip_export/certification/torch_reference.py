"""Reference vectors of the fp32 graphs: torch's eager fp32 towers, for `jinaclip certify --against`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jinaclip.backends.base import Arrays
from jinaclip.backends.cost import GPU_COST
from jinaclip.bundle.manifest import Bundle
from jinaclip.encoders import ENCODERS
from jinaclip.terminal import say
from jinaclip_export.bundle.source import Source
from jinaclip_export.certification.inputs import Items
from jinaclip_export.certification.measure import run_items
from jinaclip_export.checkpoint.reader import Checkpoint
from jinaclip_export.errors import CertificationError
from jinaclip_export.onnx_export.graphs import ImageGraph, TextGraph


class TorchReference:
    """The checkpoint that a bundle was made from.

    Args:
        directory: the checkpoint's directory.
        bundle: the bundle.
        threads: cores that torch uses; None for torch's default.

    Raises:
        CheckpointError: the directory is not a valid checkpoint.
        CertificationError: the checkpoint's weights are not those of the bundle.
    """

    name = f"torch {torch.__version__.partition('+')[0]}"

    def __init__(self, directory: str, bundle: Bundle, threads: int | None) -> None:
        self.bundle = bundle
        self.checkpoint = Checkpoint(Path(directory), bundle.model.get("adaptation"))
        found, expected = self.checkpoint.weights_sha256(), bundle.model["weights_sha256"]
        if found != expected:
            raise CertificationError(
                f"--against {directory} has weights {found[:16]}…, the bundle was made from {expected[:16]}…; "
                "use the checkpoint that was exported"
            )
        if threads is not None:
            torch.set_num_threads(threads)

    def vectors(self, tower: str, items: Items) -> np.ndarray:
        """Raw vectors [N, D] of the items, each run alone."""
        return torch_vectors(self.checkpoint, self.bundle, tower, items)


def torch_vectors(source: Source, bundle: Bundle, tower: str, items: Items) -> np.ndarray:
    """Raw vectors [N, D] of the items, each run alone by torch.

    Args:
        source: what the bundle was made from.
    """
    say(f"torch {tower}")
    graph: TextGraph | ImageGraph
    if tower == "text":
        graph = TextGraph(source.text_tower())
    else:
        graph = ImageGraph(source.image_tower(), bundle.preprocessing, bundle.tower("image").input_dtype)
    return run_items(ENCODERS[tower](bundle, "fp32", TorchSession(graph)), items, range(len(items)))


class TorchSession:
    """A tower in torch, run by its encoder. See jinaclip.backends.base.Session."""

    backend, device = "torch", "cpu"
    threads = concurrency = 1
    cost = GPU_COST  # without the check of the memory for attention scores
    tiled_above = None

    def __init__(self, graph: TextGraph | ImageGraph) -> None:
        self.graph = graph

    def run(self, inputs: Arrays, *, outputs: Sequence[str] | None = None, **options: bool) -> dict[str, np.ndarray]:
        (batch,) = inputs.values()
        (name,) = outputs or ()
        with torch.inference_mode():
            return {name: self.graph(torch.from_numpy(batch))[0].numpy()}

    def describe(self) -> dict[str, Any]:
        return {"backend": self.backend, "device": self.device}

    def close(self) -> None:
        """The graph is freed with this object."""
