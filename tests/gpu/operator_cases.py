"""The inputs with which the CUDA operators are checked and timed: small shapes of every path, and the model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support import cuda_operator_references as references

Array = NDArray[Any]

EPSILON = 1e-5
PATCHES, IMAGES = 1297, 32
TEXT_PRODUCTS = {"qkv": (1024, 3072), "out": (1024, 1024), "fc1": (1024, 4096), "fc2": (4096, 1024)}


@dataclass
class Case:
    """An operator with its inputs. The first `row_inputs` of them are repeated `repeats` times along their rows."""

    operator: str
    title: str
    inputs: list[Array]
    outputs: list[tuple[tuple[int, ...], type]]  # of one repeat
    reference: Callable[[], list[Array]]  # of one repeat
    error: Callable[[Array], Array | float]  # of float32 arithmetic, absolute, from the reference
    attributes: dict[str, Any] = field(default_factory=dict)
    row_inputs: tuple[int, ...] = (0,)
    repeats: int = 1
    flops: float = 0.0
    exact_repeats: bool = True
    unused: int = 0  # outputs that only the operator itself uses

    def repeated(self, index: int) -> Array:
        x = self.inputs[index]
        if index not in self.row_inputs or self.repeats == 1:
            return x
        return np.concatenate([x] * self.repeats)

    def output_shape(self, index: int) -> tuple[int, ...]:
        shape = self.outputs[index][0]
        return (shape[0] * self.repeats, *shape[1:])

    def moved_bytes(self) -> int:
        """Each input read once, each output written once."""
        read = sum(x.nbytes * (self.repeats if i in self.row_inputs else 1) for i, x in enumerate(self.inputs))
        written = sum(
            int(np.prod(self.output_shape(i))) * np.dtype(kind).itemsize for i, (_, kind) in enumerate(self.outputs)
        )
        return read + written


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32).astype(np.float16)


def norm_error(expected: Array) -> Array:
    return 2e-5 * (1 + np.abs(expected))


def gain_and_bias(rng: np.random.Generator, width: int) -> tuple[Array, Array]:
    return rng.normal(1, 0.5, width).astype(np.float32), rng.normal(0, 0.5, width).astype(np.float32)


def layer_norm_case(rows: int, width: int, dtype: type, repeats: int = 1) -> Case:
    rng = np.random.default_rng(rows + width)
    x: Array = (normal(rng, rows, width) * 3 + 1).astype(dtype)
    gain, bias = gain_and_bias(rng, width)
    return Case(
        "LayerNorm",
        f"{rows * repeats} x {width} {np.dtype(dtype).name}",
        [x, gain, bias],
        [((rows, width), np.float16)],
        lambda: [references.layer_norm(x, gain, bias, EPSILON)],
        norm_error,
        {"epsilon": EPSILON},
        repeats=repeats,
    )


def add_layer_norm_case(rows: int, width: int, keep_norm: int, repeats: int = 1) -> Case:
    rng = np.random.default_rng(rows + width)
    residual, delta = rng.standard_normal((rows, width), np.float32) * 5, normal(rng, rows, width)
    gain, bias = gain_and_bias(rng, width)
    return Case(
        "AddLayerNorm",
        f"{rows * repeats} x {width} keep_norm {keep_norm}",
        [residual, delta, gain, bias],
        [((rows, width), np.float32), ((rows, width), np.float16)],
        lambda: list(references.add_layer_norm(residual, delta, gain, bias, EPSILON, bool(keep_norm))),
        norm_error,
        {"epsilon": EPSILON, "keep_norm": keep_norm},
        row_inputs=(0, 1),
        repeats=repeats,
    )


def add_post_norm_case(rows: int, width: int, dtype: type, one: bool = False, repeats: int = 1) -> Case:
    rng = np.random.default_rng(rows + width)
    residual: Array = (rng.standard_normal((rows, width), np.float32) * 5).astype(dtype)
    delta = normal(rng, rows, width)
    residual = residual[0] if one else residual
    gain, bias = gain_and_bias(rng, width)
    return Case(
        "AddPostNorm",
        f"{rows * repeats} x {width} {np.dtype(dtype).name}" + (" one residual" if one else ""),
        [residual, delta, gain, bias],
        [((rows, width), np.float16)],
        lambda: [references.add_post_norm(residual, delta, gain, bias, EPSILON)],
        norm_error,
        {"epsilon": EPSILON},
        row_inputs=(1,) if one else (0, 1),
        repeats=repeats,
    )


def split_rotary_case(length: int, heads: int, head_width: int, interleaved: int, repeats: int = 1) -> Case:
    rng = np.random.default_rng(length + head_width)
    width = heads * head_width
    qkv = normal(rng, 1, length, 3 * width)
    angles = rng.uniform(0, 7, (length, head_width // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Case(
        "SplitRotary",
        f"{length * repeats} x {heads} heads of {head_width}" + (" interleaved" if interleaved else ""),
        [qkv, cos, sin],
        [((1, length, width), np.float16)] * 3,
        lambda: list(references.split_rotary(qkv, cos, sin, heads, bool(interleaved))),
        lambda expected: 2e-6,
        {"num_heads": heads, "interleaved": interleaved},
        repeats=repeats,
    )


def rotary_attention_case(
    lengths: list[int], heads: int, interleaved: int, packed: bool = True, repeats: int = 1
) -> Case:
    """Texts one after the other, or pictures of one size."""
    rng = np.random.default_rng(sum(lengths))
    rows, width, longest = sum(lengths), heads * 64, max(lengths)
    angles = rng.uniform(0, 7, (longest, 32))
    tables = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
    qkv = normal(rng, *((rows,) if packed else (len(lengths), longest)), 3 * width)
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    given = [positions, offsets, np.zeros((len(lengths), longest), np.int32)] if packed else []
    shown = f"{len(lengths)} of {lengths[0]}" if len(set(lengths)) == 1 else str(lengths)

    @cache
    def reference() -> tuple[Array, Array]:
        texts = (positions, offsets) if packed else (None, None)
        return references.rotary_attention(qkv, tables[0], tables[1], texts[0], texts[1], heads, bool(interleaved))

    return Case(
        "RotaryAttention",
        f"{shown}, {heads} heads" + (" interleaved" if interleaved else "") + (" packed" if packed else ""),
        [qkv, *tables, *given],
        [((*qkv.shape[:-1], width), np.float16)],
        lambda: [reference()[0]],
        lambda expected: 1e-4 + 2.0**-11 * reference()[1],
        {"num_heads": heads, "interleaved": interleaved},
        repeats=repeats,
        flops=4.0 * width * repeats * sum(length**2 for length in lengths),
        unused=1,
    )


def swiglu_norm_case(rows: int, width: int, padded: int, repeats: int = 1) -> Case:
    rng = np.random.default_rng(rows + width)
    gate_up, (gain, bias) = normal(rng, rows, 2 * padded) * np.float16(2), gain_and_bias(rng, width)
    gate_up[0] *= 200  # products beyond 65504
    return Case(
        "SwigluNorm",
        f"{rows * repeats} x {width} of {padded}",
        [gate_up, gain, bias],
        [((rows, padded), np.float16)],
        lambda: [references.swiglu_norm(gate_up, gain, bias, EPSILON)],
        norm_error,
        {"epsilon": EPSILON},
        repeats=repeats,
    )


def gelu_case(rows: int, width: int, repeats: int = 1) -> Case:
    x = normal(np.random.default_rng(rows + width), rows, width) * np.float16(3)
    return Case(
        "Gelu",
        f"{rows * repeats} x {width}",
        [x],
        [((rows, width), np.float16)],
        lambda: [references.gelu(x)],
        lambda expected: 2**-17 * np.abs(expected),
        repeats=repeats,
    )


def linear_case(rows: int, k: int, n: int, biased: bool = True, repeats: int = 1) -> Case:
    rng = np.random.default_rng(rows + k + n)
    x, weight = normal(rng, rows, k), (rng.standard_normal((k, n), np.float32) / np.sqrt(k)).astype(np.float16)
    bias = normal(rng, n)
    return Case(
        "Linear",
        f"{rows * repeats} x {k} x {n}" + ("" if biased else " no bias"),
        [x, weight, bias] if biased else [x, weight],
        [((rows, n), np.float16)],
        lambda: [references.linear(x, weight, bias if biased else None)],
        lambda expected: 1e-4,  # tensor cores truncate each of the k / 16 partial sums, which are of order 1
        repeats=repeats,
        flops=2.0 * rows * repeats * k * n,
        exact_repeats=False,
    )


def mean_pool_case(texts: int, length: int, width: int, dtype: type = np.float32) -> Case:
    rng = np.random.default_rng(texts + width)
    x: Array = rng.standard_normal((texts * length, width), np.float32).astype(dtype)
    offsets = (np.arange(texts + 1) * length).astype(np.int32)
    if texts > 2:
        offsets[1] -= length // 2
    return Case(
        "MeanPool",
        f"{texts} texts of {length} x {width} {np.dtype(dtype).name}",
        [x, offsets],
        [((texts, width), np.float32)],
        lambda: [references.mean_pool(x, offsets)],
        lambda expected: 1e-6,
    )


def l2_normalize_case(rows: int, width: int) -> Case:
    x = np.random.default_rng(rows + width).standard_normal((rows, width), np.float32)
    return Case(
        "L2Normalize",
        f"{rows} x {width}",
        [x],
        [((rows, width), np.float32)],
        lambda: [references.l2_normalize(x)],
        lambda expected: 1e-6,
    )


def small_cases() -> list[Case]:
    """Each path of each kernel: warps, blocks, and rows without vector accesses."""
    cases = []
    for width in (7, 24, 120, 1000, 1024, 2730, 2736, 4096):
        for rows in (1, 33):
            cases += [layer_norm_case(rows, width, kind) for kind in (np.float16, np.float32)]
            cases += [add_layer_norm_case(rows, width, keep) for keep in (0, 1)]
            cases += [add_post_norm_case(rows, width, kind) for kind in (np.float16, np.float32)]
            cases += [add_post_norm_case(rows, width, np.float32, one=True)]
            cases += [gelu_case(rows, width), l2_normalize_case(rows, width)]
    for heads, head_width in ((16, 64), (5, 24), (3, 40), (2, 6)):
        for interleaved in (0, 1):
            cases += [split_rotary_case(33, heads, head_width, interleaved)]
    for interleaved in (0, 1):
        for lengths in ([1], [33], [5, 64, 1, 0, 65, 130, 17], [200, 256, 3], [300, 10, 257, 0, 500], [1297]):
            cases += [rotary_attention_case(lengths, 2, interleaved)]
        for length in (33, 300):
            cases += [rotary_attention_case([length] * 3, 3, interleaved, packed=False)]
    for width, padded in ((2730, 2736), (341, 352), (24, 32), (7, 7), (3074, 3088)):
        cases += [swiglu_norm_case(rows, width, padded) for rows in (1, 33)]
    for k, n in ((128, 384), (120, 360), (1024, 72)):
        cases += [linear_case(rows, k, n, biased) for rows in (1, 33) for biased in (True, False)]
    for dtype in (np.float16, np.float32):
        cases += [mean_pool_case(texts, 17, width, dtype) for texts, width in ((1, 1024), (5, 120), (3, 7))]
    return cases


def model_cases() -> list[Case]:
    """The shapes of the model: 32 images, one, 4096 tokens in texts of several lengths, and one text of 32."""
    image = PATCHES
    cases = [
        layer_norm_case(image, 1024, np.float32, IMAGES),
        layer_norm_case(image, 1024, np.float16, IMAGES),
        add_layer_norm_case(image, 1024, 0, IMAGES),
        split_rotary_case(image, 16, 64, 1, IMAGES),
        rotary_attention_case([image], 16, 1, packed=False, repeats=IMAGES),
        swiglu_norm_case(image, 2730, 2736, IMAGES),
    ]
    for tokens in (4096, 32):
        cases += [
            add_layer_norm_case(tokens, 1024, 1),
            add_post_norm_case(tokens, 1024, np.float16),
            add_post_norm_case(tokens, 1024, np.float32, one=True),
            rotary_attention_case([32] * (tokens // 32), 16, 0),
            gelu_case(32, 4096, repeats=tokens // 32),
            mean_pool_case(max(1, tokens // 128), min(tokens, 128), 1024, np.float16),
        ]
    cases += [add_post_norm_case(128, 1024, np.float16, repeats=164)]
    cases += [layer_norm_case(rows, 1024, np.float32) for rows in (32, image)]
    cases += [add_layer_norm_case(image, 1024, 0), swiglu_norm_case(image, 2730, 2736)]
    cases += [split_rotary_case(image, 16, 64, 1), l2_normalize_case(32, 1024)]
    cases += [rotary_attention_case([image], 16, 1, packed=False)]
    cases += [rotary_attention_case([length] * (4096 // length), 16, 0) for length in (128, 256, 512, 2048)]
    return cases


def product_cases() -> list[Case]:
    cases = []
    for k, n in ((1024, 3072), (1024, 1024), (1024, 5472), (2736, 1024)):
        cases += [linear_case(PATCHES, k, n, repeats=IMAGES), linear_case(PATCHES, k, n)]
    for k, n in ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024)):
        cases += [linear_case(rows, k, n) for rows in (4096, 32)]
    return cases


def short_cases() -> list[Case]:
    """What one text of 32 tokens runs, and norms just on both sides of where other kernels are launched."""
    return [
        add_post_norm_case(32, 1024, np.float16),
        rotary_attention_case([32], 16, 0),
        gelu_case(32, 4096),
        layer_norm_case(32, 1024, np.float16),
        mean_pool_case(1, 32, 1024, np.float16),
        l2_normalize_case(1, 1024),
        *(linear_case(32, k, n) for k, n in TEXT_PRODUCTS.values()),
        *(add_post_norm_case(64, 1024, np.float16, repeats=repeats) for repeats in (4, 32, 33)),
        *(add_layer_norm_case(64, 1024, 0, repeats=repeats) for repeats in (4, 32, 33)),
        swiglu_norm_case(PATCHES, 2730, 2736),
    ]
