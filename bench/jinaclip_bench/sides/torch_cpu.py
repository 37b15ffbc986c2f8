"""Torch's sides on a CPU: eager execution of the bundle's checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.cases.settings import Embed
from jinaclip_bench.errors import BenchError
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
    load = _text if tower == "text" else _image
    embedders = {side: load(checkpoint, bundle, DTYPES[side]) for side in sides}
    try:
        yield embedders
    finally:
        embedders.clear()
        torch.set_num_threads(threads_before)


def _text(checkpoint: Checkpoint, bundle: Bundle, dtype: torch.dtype) -> Embed:
    tower = checkpoint.text_tower().to(dtype)

    @torch.inference_mode()
    def embed(ids: np.ndarray) -> np.ndarray:
        return _unit(tower(torch.from_numpy(ids)))

    return embed


def _image(checkpoint: Checkpoint, bundle: Bundle, dtype: torch.dtype) -> Embed:
    tower = checkpoint.image_tower().to(dtype)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (bundle.preprocessing.mean, bundle.preprocessing.std)
    )

    @torch.inference_mode()
    def embed(pixels: np.ndarray) -> np.ndarray:
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0  # [B, 3, S, S]
        return _unit(tower(((scaled - mean) / std).to(dtype)))

    return embed


def _unit(raw: Tensor) -> np.ndarray:
    unit: np.ndarray = F.normalize(raw, dim=-1).numpy()
    return unit
