"""Match the nodes around the Attention nodes of a bundle's graph."""

from __future__ import annotations

import onnx_ir as ir

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import HALF, attributes, constant, nodes, producer, producers


def head_size(model: ir.Model) -> int:
    """Width of a head, which is twice the width of the rotary tables."""
    return 2 * int(constant(nodes(model, "RotaryEmbedding")[0].inputs[1]).shape[-1])


def mask_of(attention: ir.Node) -> ir.Value | None:
    """The mask of an Attention before it is expanded, bool [B, 1, 1, T]: True for tokens that are not padding. None if
    the Attention has no mask.

    Raises:
        PassError: the mask is not expanded from [B, 1, 1, T].
    """
    expanded = attention.inputs[3] if len(attention.inputs) > 3 else None
    if expanded is None:
        return None
    expand = producer(expanded, "Expand")
    if expand is None or expand.inputs[0] is None:
        raise PassError("the attention mask is not expanded from [B, 1, 1, T]; export the bundle again")
    return expand.inputs[0]


def before_rounding(value: ir.Value | None) -> ir.Value | None:
    """The value from which an input of an Attention was made by rounding to float16 and a cast back to float32. None if
    the input was not rounded.
    """
    casts = producers(value, "Cast", "Cast")
    return casts[1].inputs[0] if casts and attributes(casts[1]).get("to") == HALF else None


def before_split(value: ir.Value | None) -> tuple[ir.Value, ir.Node | None] | None:
    """The value [B, T, D] that was split into heads to make an input of an Attention, [B, heads, T, K], and the
    RotaryEmbedding after the split, if there is one. None if the input was made in another way.
    """
    rotary = producer(value, "RotaryEmbedding")
    split = producers(rotary.inputs[0] if rotary else value, "Transpose", "Reshape")
    source = split[1].inputs[0] if split else None
    return None if source is None else (source, rotary)
