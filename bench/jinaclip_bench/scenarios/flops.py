"""Count the floating-point operations of a tower's run, from the sizes in the manifest.

A multiply-add counts as two operations. Norms, activations, softmax, rotary positions and padding are not counted. The
count is the useful work and is the same for every side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from jinaclip.bundle.manifest import TowerManifest
from jinaclip_bench.cases.settings import BenchSettings
from jinaclip_bench.cases.table import Case

if TYPE_CHECKING:
    from jinaclip_export.towers.config import ImageConfig

FEED_FORWARD_MATRICES = {"text": 2, "image": 3}  # matrices of width × hidden_size in a block; SwiGLU has three


def flops_and_matmul_rate(
    settings: BenchSettings, case: Case, lengths: Sequence[int]
) -> tuple[int | None, Callable[[], float] | None]:
    """Operations of a call, and a function that measures the GPU's rate for a large matrix product, in TFLOP/s.

    Both are None on a CPU.

    Args:
        settings: settings of the run.
        case: the case.
        lengths: lengths of the texts, in tokens.
    """
    if settings.gpu is None:
        return None, None
    from jinaclip_bench.sides.torch_cuda import matmul_tflops

    manifest, flops = settings.bundle.tower(case.tower), None
    if case.tower == "text":
        flops = flops_of_texts(manifest, lengths)
    elif settings.checkpoint is not None:  # the manifest does not have the patch size
        flops = flops_of_images(manifest, case.rows, settings.checkpoint.config.image)
    return flops, partial(matmul_tflops, settings.gpu.index)


def flops_of_texts(tower: TowerManifest, lengths: Sequence[int]) -> int:
    """Operations for texts with the given numbers of tokens."""
    return _flops_of_blocks(tower, lengths)


def flops_of_images(tower: TowerManifest, images: int, config: ImageConfig) -> int:
    """Operations for images: the patch embedding, and the blocks for the patches and the CLS token."""
    patches = config.grid**2
    embedding = 2 * patches * 3 * config.patch_size**2 * tower.width
    return images * embedding + _flops_of_blocks(tower, [patches + 1] * images)


def _flops_of_blocks(tower: TowerManifest, lengths: Sequence[int]) -> int:
    width = tower.width
    weights = 4 * width**2 + FEED_FORWARD_MATRICES[tower.name] * width * tower.hidden_size
    attention = sum(4 * tokens**2 * width for tokens in lengths)  # scores, and the weighted sum of the values
    return tower.layers * (2 * weights * sum(lengths) + attention)
