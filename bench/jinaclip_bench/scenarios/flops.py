"""Floating-point operations of a tower's run, by the sizes in the manifest, and what a GPU reaches in such.

Two for each multiply-add. Norms, activations, softmax and rotary positions are left out, and so is padding: this is the
work that was asked for, whatever a side makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from jinaclip.bundle.manifest import TowerManifest
from jinaclip_bench.cases.settings import Settings
from jinaclip_bench.cases.table import Case

if TYPE_CHECKING:
    from jinaclip_export.towers.config import ImageConfig

FEED_FORWARD_MATRICES = {"text": 2, "image": 3}  # of width × hidden_size in a block; SwiGLU has three


def work(settings: Settings, case: Case, lengths: Sequence[int]) -> tuple[int | None, Callable[[], float] | None]:
    """Operations of a call, and what measures the TFLOP/s that the GPU reaches with large matrices; None on a CPU.

    Args:
        lengths: of the texts, in tokens.
    """
    if settings.gpu is None:
        return None, None
    from jinaclip_bench.sides.torch_cuda import matmul_tflops

    manifest, flops = settings.bundle.tower(case.tower), None
    if case.tower == "text":
        flops = flops_of_texts(manifest, lengths)
    elif settings.checkpoint is not None:  # only it tells how large a patch is
        flops = flops_of_images(manifest, case.rows, settings.checkpoint.config.image)
    return flops, partial(matmul_tflops, settings.gpu.index)


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
