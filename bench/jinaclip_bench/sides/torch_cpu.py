"""Torch's sides on a CPU: eager execution of the bundle's checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.cases.settings import Embed
from jinaclip_bench.errors import BenchError
from jinaclip_bench.sides.torch_towers import mean_and_std
from jinaclip_export.checkpoint.reader import WEIGHTS, Checkpoint

DTYPES = {"torch-fp32": torch.float32, "torch-bf16": torch.bfloat16}


def matching_checkpoint(bundle: Bundle, directory: Path) -> Checkpoint:
    """Open the checkpoint in `directory`, with the adapter of the bundle.

    Raises:
        BenchError: the checkpoint's weights are not those of the bundle.
        CheckpointError: the directory is not a valid checkpoint.
    """
    checkpoint = Checkpoint(directory, bundle.model.get("adaptation"))
    found, expected = checkpoint.weights_sha256(), bundle.model["weights_sha256"]
    if found != expected:
        raise BenchError(
            f"{directory / WEIGHTS} has sha256 {found[:16]}…, the bundle was made from {expected[:16]}…; "
            "expected the checkpoint that the bundle was exported from"
        )
    return checkpoint


@contextmanager
def open_torch(
    checkpoint: Checkpoint, bundle: Bundle, tower: str, *, threads: int, sides: Sequence[str] = tuple(DTYPES)
) -> Iterator[dict[str, Embed]]:
    """Open one tower in the type of each side and free it at the end. Meanwhile torch uses `threads` threads."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    embedders = {side: _open(checkpoint, bundle, tower, DTYPES[side]) for side in sides}
    try:
        yield embedders
    finally:
        embedders.clear()
        torch.set_num_threads(threads_before)


def _open(checkpoint: Checkpoint, bundle: Bundle, tower: str, dtype: torch.dtype) -> Embed:
    module = (checkpoint.text_tower() if tower == "text" else checkpoint.image_tower()).to(dtype)
    mean, std = mean_and_std(bundle)

    @torch.inference_mode()
    def embed(values: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(values)
        if tower == "image":
            scaled = inputs.permute(0, 3, 1, 2).float() / 255.0  # [B, 3, S, S]
            inputs = ((scaled - mean) / std).to(dtype)
        unit: np.ndarray = F.normalize(module(inputs), dim=-1).numpy()
        return unit

    return embed
