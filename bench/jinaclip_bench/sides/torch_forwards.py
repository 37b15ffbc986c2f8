"""Torch's ways to run a tower on a GPU in float16: eager, and compiled to one graph by torch.compile.

Each is a function of tensors on the device, with the name of its side in the records. This module does not need CUDA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jinaclip_bench.measuring.timing import AUTOTUNED, CAPTURED, COMPILED, UNPADDED
from jinaclip_bench.sides.torch_towers import Attention, TextsOfIds, TextsWithoutPadding, jagged_attention
from jinaclip_export.towers.text import TextTower

FP16 = "torch-fp16"

Forward = Callable[..., Tensor]


def compiled(forward: nn.Module, *, dynamic: bool, max_autotune: bool = False) -> Forward:
    """Compile a module with `torch.compile`, without graph breaks.

    Args:
        forward: the module.
        dynamic: whether to use one graph for all shapes; otherwise one for each input shape.
        max_autotune: whether to choose between Triton's and cuBLAS's products by timing them while compiling, which
            takes minutes at full size.
    """
    torch._dynamo.config.specialize_float = True  # otherwise a dynamic graph is traced and compiled twice
    mode = "max-autotune-no-cudagraphs" if max_autotune else None
    compiled_forward: Forward = torch.compile(forward, dynamic=dynamic, fullgraph=True, mode=mode)
    return compiled_forward


def image_forwards(forward: nn.Module, *, compiles: bool, max_autotune: bool = False) -> dict[str, Forward]:
    """Sides of the image tower. The side that is captured as a CUDA graph is also compiled.

    Args:
        forward: an ImagesOfPixels module.
        compiles: whether torch.compile works on this machine.
        max_autotune: whether to add the side compiled with max-autotune.
    """
    forwards: dict[str, Forward] = {FP16: forward}
    if compiles:
        forwards[f"{FP16}{COMPILED}"] = forwards[f"{FP16}{CAPTURED}"] = compiled(forward, dynamic=False)
        if max_autotune:
            forwards[f"{FP16}{AUTOTUNED}"] = compiled(forward, dynamic=False, max_autotune=True)
    return forwards


def text_forwards(tower: TextTower, attention: Attention, *, compiles: bool) -> dict[str, Forward]:
    """Sides of the text tower. Sides whose name starts with UNPADDED take ids without padding.

    Batches of texts have different shapes, so compiled sides use one graph for all shapes. The side that is captured
    has a graph for each shape.

    Args:
        tower: the text tower.
        attention: attention of texts without padding. torch.compile cannot compile `jagged_attention`.
        compiles: whether torch.compile works on this machine.
    """
    padded, unpadded = TextsOfIds(tower), TextsWithoutPadding(tower, attention)
    forwards: dict[str, Forward] = {FP16: padded, UNPADDED: unpadded}
    if compiles:
        forwards[f"{FP16}{COMPILED}"] = compiled(padded, dynamic=True)
        forwards[f"{FP16}{CAPTURED}"] = compiled(padded, dynamic=False)
        if attention is not jagged_attention:
            forwards[f"{UNPADDED}{COMPILED}"] = compiled(unpadded, dynamic=True)
    return forwards
