"""References of the operators of the domain `jinaclip`, in numpy.

Each function takes the operator's inputs as they are (float16, float32, int32 arrays), computes in float64 and returns
float64, so that a test chooses the tolerance of the rounding to the operator's output type. The one exception is the
sum that AddLayerNorm stores, which is a float32 sum by definition. Leading dimensions are free where a shape below
begins with `...`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def layer_norm(x: Array, gain: Array, bias: Array, epsilon: float) -> Float64:
    """x [..., D], gain [D], bias [D] to [..., D]; the variance is the mean of squared differences from the mean."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    normed: Float64 = centred / np.sqrt(variance + epsilon) * gain.astype(np.float64) + bias.astype(np.float64)
    return normed


def add_layer_norm(
    residual: Array, delta: Array, gain: Array, bias: Array, epsilon: float, keep_norm: bool
) -> tuple[Float64, Float64]:
    """residual [..., D] float32 and delta [..., D] to (s, y), both [..., D].

    y is the norm of the float32 sum; s is that norm before its rounding to float16 (keep_norm) or the sum.
    """
    total = residual.astype(np.float32) + delta.astype(np.float32)
    normed = layer_norm(total, gain, bias, epsilon)
    return (normed if keep_norm else total.astype(np.float64)), normed


def add_post_norm(residual: Array, delta: Array, gain: Array, bias: Array, epsilon: float) -> Float64:
    """residual [..., D] or [D], float16 or float32, and delta [..., D] to [..., D]: the norm of the float32 sum."""
    return layer_norm(residual.astype(np.float32) + delta.astype(np.float32), gain, bias, epsilon)


def rotary(x: Array, cos: Array, sin: Array, positions: Array, num_heads: int, interleaved: bool) -> Float64:
    """x [R, D] with one position a row, cos and sin [P, K/2], to [R, D]; K = D / num_heads.

    A pair (a, b) of a head becomes (a cos - b sin, a sin + b cos). Pairs are (2i, 2i + 1) if interleaved, else
    (i, i + K/2).
    """
    rows, width = x.shape
    heads = x.astype(np.float64).reshape(rows, num_heads, width // num_heads)
    half = heads.shape[-1] // 2
    c = cos.astype(np.float64)[positions][:, None, :]
    s = sin.astype(np.float64)[positions][:, None, :]
    first, second = (
        (heads[..., 0::2], heads[..., 1::2]) if interleaved else (heads[..., :half], heads[..., half : 2 * half])
    )
    turned = np.empty_like(heads)
    if interleaved:
        turned[..., 0::2] = first * c - second * s
        turned[..., 1::2] = first * s + second * c
    else:
        turned[..., :half] = first * c - second * s
        turned[..., half:] = first * s + second * c
    return turned.reshape(rows, width)


def split_rotary(
    qkv: Array, cos: Array, sin: Array, num_heads: int, interleaved: bool
) -> tuple[Float64, Float64, Float64]:
    """qkv [..., T, 3D], cos and sin [P, K/2], to q, k and v [..., T, D]; a row's position is its index along T."""
    positions = np.arange(math.prod(qkv.shape[:-1])) % max(qkv.shape[-2], 1)
    return _turned(qkv, cos, sin, positions, num_heads, interleaved)


def _turned(
    qkv: Array, cos: Array, sin: Array, positions: Array, num_heads: int, interleaved: bool
) -> tuple[Float64, Float64, Float64]:
    leading = qkv.shape[:-1]
    width = qkv.shape[-1] // 3
    rows = qkv.reshape(math.prod(leading), 3 * width)
    q = rotary(rows[:, :width], cos, sin, positions, num_heads, interleaved)
    k = rotary(rows[:, width : 2 * width], cos, sin, positions, num_heads, interleaved)
    v = rows[:, 2 * width :].astype(np.float64)
    return q.reshape(*leading, width), k.reshape(*leading, width), v.reshape(*leading, width)


def swiglu_norm(gate_up: Array, gain: Array, bias: Array, epsilon: float) -> Float64:
    """gate_up [..., 2W], gain and bias [F], F <= W, to [..., W].

    The gate is columns 0 to F-1, up is columns W to W+F-1. The result is the LayerNorm over F of silu(gate) * up;
    columns F to W-1 are zero.
    """
    padded = gate_up.shape[-1] // 2
    width = gain.shape[0]
    gate = gate_up[..., :width].astype(np.float64)
    up = gate_up[..., padded : padded + width].astype(np.float64)
    with np.errstate(over="ignore"):  # exp of a gate of -65504 is inf, and the quotient the right -0
        product = gate / (1.0 + np.exp(-gate)) * up
    y = np.zeros((*gate_up.shape[:-1], padded))
    y[..., :width] = layer_norm(product, gain, bias, epsilon)
    return y


def gelu(x: Array) -> Float64:
    """x of any shape to the same shape: x * Phi(x) with the exact error function."""
    wide = x.astype(np.float64)
    result: Float64 = wide * 0.5 * _erfc(-wide / math.sqrt(2.0)) if x.size else wide
    return result


def linear(x: Array, weight: Array, bias: Array | None = None) -> Float64:
    """x [..., K], weight [K, N], bias [N] to [..., N]: x @ weight + bias."""
    product: Float64 = x.astype(np.float64) @ weight.astype(np.float64)
    return product if bias is None else product + bias.astype(np.float64)


def mean_pool(x: Array, offsets: Array) -> Float64:
    """x [R, D], offsets [B + 1] to [B, D]: the mean of rows offsets[b] to offsets[b + 1] - 1; NaN of no rows."""
    means = np.full((len(offsets) - 1, x.shape[1]), np.nan)
    for text, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if end > begin:
            means[text] = x[begin:end].astype(np.float64).mean(axis=0)
    return means


def l2_normalize(x: Array) -> Float64:
    """x [..., D] to [..., D]: x / max(its Euclidean norm, 1e-12)."""
    wide = x.astype(np.float64)
    unit: Float64 = wide / np.maximum(np.sqrt((wide * wide).sum(axis=-1, keepdims=True)), 1e-12)
    return unit


def rotary_attention(
    qkv: Array,
    cos: Array,
    sin: Array,
    positions: Array | None,
    offsets: Array | None,
    num_heads: int,
    interleaved: bool,
) -> tuple[Float64, Float64]:
    """qkv [..., T, 3D], cos and sin [P, K/2], positions [...], offsets [B + 1] to y [..., T, D], and the same of |v|.

    Text b is rows offsets[b] to offsets[b + 1] - 1 of all rows; without offsets every T rows are one. Without positions
    a row's position is its index in its text. Turned queries and keys are rounded to float16, as products take them.
    The weights' rounding to float16 changes y by at most 2^-11 of the second result. Rows of no text are NaN.
    """
    rows = math.prod(qkv.shape[:-1])
    if offsets is None:
        offsets = np.arange(0, rows + 1, max(qkv.shape[-2], 1))
    positions = _counted(rows, offsets) if positions is None else positions
    q, k, v = _turned(qkv, cos, sin, positions, num_heads, interleaved)
    width = qkv.shape[-1] // 3
    with np.errstate(over="ignore"):
        q, k = (x.astype(np.float16).astype(np.float64) for x in (q, k))
    q, k, v = (x.reshape(rows, num_heads, width // num_heads).transpose(1, 0, 2) for x in (q, k, v))
    y, size = np.full_like(v, np.nan), np.full_like(v, np.nan)
    for begin, end in itertools.pairwise(offsets):
        if end > begin:
            part = slice(begin, end)
            scores = q[:, part] @ k[:, part].transpose(0, 2, 1) / math.sqrt(width // num_heads)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            y[:, part], size[:, part] = weights @ v[:, part], weights @ np.abs(v[:, part])
    shape = (*qkv.shape[:-1], width)
    return y.transpose(1, 0, 2).reshape(shape), size.transpose(1, 0, 2).reshape(shape)


def _counted(rows: int, offsets: Array) -> Array:
    """Of each row, its index in its text; 0 outside of texts."""
    positions = np.zeros(rows, np.int64)
    for begin, end in itertools.pairwise(offsets):
        positions[begin:end] = np.arange(end - begin)
    return positions
