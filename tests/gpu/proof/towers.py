"""Torch's towers of the model that is measured, on the device."""

from __future__ import annotations

from pathlib import Path

import torch

from jinaclip_export.checkpoint.reader import Checkpoint
from jinaclip_export.towers.config import read_config
from jinaclip_export.towers.image import ImageTower
from jinaclip_export.towers.text import TextTower


def exact_products() -> None:
    """float32 products of torch in float32, not in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def text_tower(checkpoint: Path, device: str, dtype: torch.dtype) -> TextTower:
    return Checkpoint(checkpoint).text_tower().to(device, dtype)


def image_tower(checkpoint: Path, device: str, dtype: torch.dtype) -> ImageTower:
    return Checkpoint(checkpoint).image_tower().to(device, dtype)


def empty_towers(topology: Path, device: str, dtype: torch.dtype) -> tuple[TextTower, ImageTower]:
    """Towers of the same sizes with torch's own initial weights: to compile for, before there is a checkpoint."""
    import json

    config = read_config(json.loads((topology / "config.json").read_text("utf-8")))
    with torch.device(device):
        towers = TextTower(config.text), ImageTower(config.image)
    text, image = (tower.to(device, dtype).eval().requires_grad_(False) for tower in towers)
    return text, image  # type: ignore[return-value]
