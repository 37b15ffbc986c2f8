"""Floating-point operations of a tower's run: what its matrices need, by the sizes in the manifest.

Two for each multiply-add. Norms, activations, softmax and rotary positions are left out, and so is padding: this is the
work that was asked for, whatever a side makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinaclip.bundle import TowerManifest
from jinaclip_export.config import ImageConfig

FEED_FORWARD_MATRICES = {"text": 2, "image": 3}  # of width × hidden_size in a block; SwiGLU has three


def flops_of_texts(tower: TowerManifest, lengths: Sequence[int]) -> int:
    """Of texts with so many tokens each."""
    return _flops_of_blocks(tower, lengths)


def flops_of_images(tower: TowerManifest, images: int, config: ImageConfig) -> int:
    """Of so many images: their patches are embedded, then CLS goes with them through the blocks."""
    patches = config.grid**2
    embedding = 2 * patches * 3 * config.patch_size**2 * tower.width
    return images * embedding + _flops_of_blocks(tower, [patches + 1] * images)


def _flops_of_blocks(tower: TowerManifest, lengths: Sequence[int]) -> int:
    width = tower.width
    weights = 4 * width**2 + FEED_FORWARD_MATRICES[tower.name] * width * tower.hidden_size
    attention = sum(4 * tokens**2 * width for tokens in lengths)  # scores, and the values that they weigh
    return tower.layers * (2 * weights * sum(lengths) + attention)
