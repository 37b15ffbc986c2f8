"""The ways in which torch runs a tower on a GPU in float16: eager, and compiled as one graph by torch.compile.

Each is a function of tensors on the device, under the name of its side in the records. Nothing here needs CUDA.
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
    """`torch.compile` without breaks in the graph.

    Args:
        dynamic: one graph for all shapes; otherwise one for each shape that comes.
        max_autotune: time Triton's products against cuBLAS's while compiling, which takes minutes at full size.
    """
    torch._dynamo.config.specialize_float = True  # otherwise a dynamic graph is traced and compiled twice
    mode = "max-autotune-no-cudagraphs" if max_autotune else None
    made: Forward = torch.compile(forward, dynamic=dynamic, fullgraph=True, mode=mode)
    return made


def image_forwards(forward: nn.Module, *, compiles: bool, max_autotune: bool = False) -> dict[str, Forward]:
    """Of pixels. The one to be captured as a CUDA graph is compiled, too.

    Args:
        forward: ImagesOfPixels.
        compiles: whether torch.compile works here.
        max_autotune: add the side of that name.
    """
    found: dict[str, Forward] = {FP16: forward}
    if compiles:
        found[f"{FP16}{COMPILED}"] = found[f"{FP16}{CAPTURED}"] = compiled(forward, dynamic=False)
        if max_autotune:
            found[f"{FP16}{AUTOTUNED}"] = compiled(forward, dynamic=False, max_autotune=True)
    return found


def text_forwards(tower: TextTower, attention: Attention, *, compiles: bool) -> dict[str, Forward]:
    """Of ids with their padding, and, where the name starts with UNPADDED, without it.

    Batches of texts differ in shape, so they share a graph; the one to be captured has a graph for each shape.

    Args:
        attention: of texts without padding. torch.compile does not see through `jagged_attention`.
        compiles: whether torch.compile works here.
    """
    padded, bare = TextsOfIds(tower), TextsWithoutPadding(tower, attention)
    found: dict[str, Forward] = {FP16: padded, UNPADDED: bare}
    if compiles:
        found[f"{FP16}{COMPILED}"] = compiled(padded, dynamic=True)
        found[f"{FP16}{CAPTURED}"] = compiled(padded, dynamic=False)
        if attention is not jagged_attention:
            found[f"{UNPADDED}{COMPILED}"] = compiled(bare, dynamic=True)
    return found
