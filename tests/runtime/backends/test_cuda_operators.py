"""The CUDA operators' sources, built for the host, in ONNX Runtime's CPU provider against numpy.

Tolerances are those of the operators' arithmetic: float32 inside, then one rounding to the output's type. A result may
differ from the float64 reference by half a unit in the last place of float16, plus what float32 loses before.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tests.support import cuda_operator_references as references

Array = NDArray[Any]
Run = Callable[..., list[Array]]

SOURCES = Path(__file__).parents[3] / "runtime/c-library/cuda"
EPSILON = 1e-5
# One warp a row (up to 1024), one block a row (to 3072), and what has no fast path: odd widths and wider rows.
WIDTHS = [1, 7, 24, 120, 128, 1000, 1024, 1032, 2730, 2736, 3072, 3080, 4096]
ROWS = [1, 2, 33]
TYPES: dict[type, int] = {np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT, np.int32: TensorProto.INT32}


@pytest.fixture(scope="module")
def run(host_operators: Path) -> Run:
    """run(operator, inputs, output types, **attributes): one node in a session; an input of None is left out."""

    def run_node(operator: str, inputs: list[Array | None], outputs: list[type], **attributes: Any) -> list[Array]:
        names = ["" if value is None else f"input_{index}" for index, value in enumerate(inputs)]
        given = {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
        results = [f"output_{index}" for index in range(len(outputs))]
        node = helper.make_node(operator, names, results, domain="jinaclip", **attributes)
        graph = helper.make_graph(
            [node],
            "one node",
            [
                helper.make_tensor_value_info(name, TYPES[value.dtype.type], [None] * value.ndim)
                for name, value in given.items()
            ],
            [
                helper.make_tensor_value_info(name, TYPES[kind], None)
                for name, kind in zip(results, outputs, strict=True)
            ],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("jinaclip", 1)], ir_version=10
        )
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(host_operators))
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            onnx.ModelProto.SerializeToString(model), options, providers=["CPUExecutionProvider"]
        )
        answers: list[Array] = session.run(None, given)
        for answer, kind in zip(answers, outputs, strict=True):
            assert answer.dtype == kind
        return answers

    return run_node


def assert_close(actual: Array, expected: Array, float32_error: Array | float) -> None:
    """Equal but for the rounding to the type of `actual` and an absolute error of the arithmetic before it."""
    assert actual.shape == expected.shape
    limits = np.finfo(actual.dtype)
    exponent = np.where(expected == 0, limits.minexp, np.frexp(expected)[1] - 1)
    half_unit = np.exp2(np.maximum(exponent, limits.minexp) - limits.nmant - 1.0)
    difference = np.abs(actual.astype(np.float64) - expected)
    assert np.all(difference <= half_unit + float32_error), (difference - half_unit - float32_error).max()


def rows_of(rng: np.random.Generator, rows: int, width: int, dtype: type = np.float16) -> Array:
    """Rows of different scales and offsets, with outliers of 6e4 and 1e-7."""
    scales = 10.0 ** rng.uniform(-2, 2, (rows, 1))
    x = rng.normal(size=(rows, width)) * scales + rng.normal(size=(rows, 1)) * scales
    if rows > 1:
        x[1, rng.integers(width)] = 6e4
        x[1, rng.integers(width)] = 1e-7
    return x.astype(dtype)


def gain_and_bias(rng: np.random.Generator, width: int) -> tuple[Array, Array]:
    return rng.normal(1, 0.5, width).astype(np.float32), rng.normal(0, 0.5, width).astype(np.float32)


def misaligned(x: Array) -> Array:
    """The same array at an address that is no multiple of 16."""
    memory = np.empty(x.size + 9, x.dtype)
    start = next(i for i in range(1, 9) if memory[i:].ctypes.data % 16 != 0)
    moved = memory[start : start + x.size].reshape(x.shape)
    moved[...] = x
    return moved


# float32 sums of up to 4096 terms, relative to values of order 1 after the normalisation
NORM_ERROR = 1e-5


def norm_error(expected: Array) -> Array:
    return NORM_ERROR * (1 + np.abs(expected))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(run: Run, width: int, dtype: type) -> None:
    rng = np.random.default_rng(width)
    gain, bias = gain_and_bias(rng, width)
    for rows in ROWS:
        x = rows_of(rng, rows, width, dtype)
        (y,) = run("LayerNorm", [x, gain, bias], [np.float16], epsilon=EPSILON)
        expected = references.layer_norm(x, gain, bias, EPSILON)
        assert_close(y, expected, norm_error(expected))


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_add_layer_norm(run: Run, width: int, keep_norm: bool) -> None:
    rng = np.random.default_rng(width)
    gain, bias = gain_and_bias(rng, width)
    for rows in ROWS:
        residual, delta = rows_of(rng, rows, width, np.float32), rows_of(rng, rows, width)
        s, y = run(
            "AddLayerNorm",
            [residual, delta, gain, bias],
            [np.float32, np.float16],
            epsilon=EPSILON,
            keep_norm=int(keep_norm),
        )
        expected_s, expected_y = references.add_layer_norm(residual, delta, gain, bias, EPSILON, keep_norm)
        assert_close(y, expected_y, norm_error(expected_y))
        if keep_norm:
            assert_close(s, expected_s, norm_error(expected_s))
            np.testing.assert_array_equal(y, s.astype(np.float16))
        else:
            np.testing.assert_array_equal(s, expected_s.astype(np.float32))


@pytest.mark.parametrize("one", [False, True], ids=["rows", "one row"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_add_post_norm(run: Run, width: int, dtype: type, one: bool) -> None:
    rng = np.random.default_rng(width)
    gain, bias = gain_and_bias(rng, width)
    for rows in ROWS:
        delta = rows_of(rng, rows, width)
        residual = rows_of(rng, 1 if one else rows, width, dtype)
        residual = residual[0] if one else residual
        (y,) = run("AddPostNorm", [residual, delta, gain, bias], [np.float16], epsilon=EPSILON)
        expected = references.add_post_norm(residual, delta, gain, bias, EPSILON)
        assert_close(y, expected, norm_error(expected))


def test_add_post_norm_beyond_65504(run: Run) -> None:
    """The sum is float32: two rows of 6e4 do not overflow."""
    x = np.full((2, 128), 6e4, np.float16)
    x[:, ::2] = 1
    gain, bias = np.ones(128, np.float32), np.zeros(128, np.float32)
    (y,) = run("AddPostNorm", [x, x, gain, bias], [np.float16], epsilon=EPSILON)
    np.testing.assert_allclose(np.abs(y.astype(np.float64)), 1, atol=1e-3)


# heads of the model (64), of the small and odd configurations, and with an odd number of pairs
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("heads", "head_width"), [(16, 64), (2, 64), (5, 24), (3, 40), (2, 6), (1, 2), (4, 8)])
def test_split_rotary(run: Run, heads: int, head_width: int, interleaved: bool) -> None:
    rng = np.random.default_rng(head_width)
    width = heads * head_width
    cos, sin = angles_of(rng, 50, head_width)
    for shape in [(1, 1), (1, 33), (3, 11), (33,), (64, 48)]:
        qkv = rows_of(rng, int(np.prod(shape)), 3 * width).clip(-4e4, 4e4).reshape(*shape, 3 * width)
        outputs = run("SplitRotary", [qkv, cos, sin], [np.float16] * 3, num_heads=heads, interleaved=int(interleaved))
        expected = references.split_rotary(qkv, cos, sin, heads, interleaved)
        largest = np.abs(qkv).max(axis=-1, keepdims=True).astype(np.float64)
        for actual, reference in zip(outputs, expected, strict=True):
            assert_close(actual, reference, 2**-22 * largest)
        np.testing.assert_array_equal(outputs[2], qkv[..., 2 * width :])


def angles_of(rng: np.random.Generator, rows: int, head_width: int) -> tuple[Array, Array]:
    angles = rng.uniform(0, 7, (rows, head_width // 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@pytest.fixture(params=["warpgroups", "mma"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts with Hopper's products, and with those that every GPU has."""
    monkeypatch.setenv("JINACLIP_CUDA_WARPGROUPS", str(int(request.param == "warpgroups")))


class Texts:
    """Inputs of RotaryAttention for texts one after the other, and its result.

    Args:
        unused: rows behind the last text.
        longest: token_offset's second dimension, at least the longest text.
    """

    def __init__(
        self, lengths: Sequence[int], heads: int = 2, *, unused: int = 0, longest: int = 16,
        interleaved: bool = False,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(0)
        self.lengths, self.heads, self.interleaved = lengths, heads, interleaved
        rows, longest = sum(lengths) + unused, max(longest, *lengths)
        self.qkv = rng.normal(size=(rows, 3 * heads * 64)).astype(np.float16)
        self.cos, self.sin = angles_of(rng, longest, 64)
        self.offsets = np.cumsum([0, *lengths]).astype(np.int32)
        self.positions = np.zeros(rows, np.int32)
        self.positions[: rows - unused] = np.concatenate([np.arange(length) for length in lengths])
        self.token_offset = np.zeros((len(lengths), longest), np.int32)

    def rows(self, text: int) -> slice:
        return slice(self.offsets[text], self.offsets[text + 1])

    def inputs(self) -> list[Array | None]:
        return [self.qkv, self.cos, self.sin, self.positions, self.offsets, self.token_offset]

    def run(self, run: Run) -> Array:
        return attention(run, self.inputs(), self.heads, self.interleaved)

    def hold(self, run: Run) -> None:
        hold_attention(self.run(run), self.inputs(), self.heads, self.interleaved)


def attention(run: Run, inputs: list[Array | None], heads: int, interleaved: bool) -> Array:
    y, _ = run("RotaryAttention", inputs, [np.float16] * 2, num_heads=heads, interleaved=int(interleaved))
    return y


def hold_attention(y: Array, inputs: list[Array | None], heads: int, interleaved: bool) -> None:
    """Right but for the weights' rounding to float16, the output's, and float32 sums and exponents."""
    expected, size = references.rotary_attention(*inputs[:5], heads, interleaved)  # type: ignore[arg-type, call-arg]
    known = ~np.isnan(expected)
    assert_close(y[known], expected[known], 2.0**-11 * size[known] + 1e-5 * (1 + size[known]))


# at and beside multiples of 16, 64, 96 and 192; more than 32 texts; an empty text
LENGTHS = [
    [1], [16], [17], [41], [64], [65], [128], [129], [256], [257], [288], [385],
    [5, 64, 1, 0, 65, 130, 17, 3], [300, 10, 257, 0, 500], [3] * 300 + [50] + [2] * 70, [2] * 40 + [270],
    [2] * 130 + [200] + [1] * 200 + [300, 140],
]  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
@pytest.mark.usefixtures("products")
def test_attention_of_packed_texts(run: Run, lengths: list[int], interleaved: bool) -> None:
    Texts(lengths, unused=21, interleaved=interleaved).hold(run)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("shape", [(3, 1), (2, 33), (1, 200), (2, 300), (3, 289)])
@pytest.mark.usefixtures("products")
def test_attention_of_pictures(run: Run, shape: tuple[int, int], interleaved: bool) -> None:
    """[B, T, 3D] without offsets: each row of the batch is one, positions are counted."""
    rng = np.random.default_rng(shape[1])
    qkv = rng.normal(size=(*shape, 3 * 2 * 64)).astype(np.float16)
    inputs: list[Array | None] = [qkv, *angles_of(rng, shape[1], 64), None, None]
    hold_attention(attention(run, inputs, 2, interleaved), inputs, 2, interleaved)


@pytest.mark.parametrize("heads", [1, 3, 16])
def test_attention_of_other_numbers_of_heads(run: Run, heads: int) -> None:
    Texts([20, 33, 70], heads).hold(run)


@pytest.mark.usefixtures("products")
def test_a_text_has_the_same_bits_beside_any_others(run: Run) -> None:
    for length in (3, 41, 130, 256, 300):
        beside = Texts([5, 260, length, 31])
        alone = Texts([length], longest=length)
        alone.qkv, alone.cos, alone.sin = beside.qkv[beside.rows(2)].copy(), beside.cos, beside.sin
        np.testing.assert_array_equal(beside.run(run)[beside.rows(2)], alone.run(run))


@pytest.mark.parametrize("lengths", [[20, 30, 70], [300, 280, 290]])
@pytest.mark.usefixtures("products")
def test_nan_and_unknown_positions_stay_in_their_text(run: Run, lengths: list[int]) -> None:
    before = Texts(lengths).run(run)
    for spoil in ("value", "position"):
        texts = Texts(lengths)
        if spoil == "value":
            texts.qkv[texts.offsets[1] + 4, 3 * 128 - 1] = np.nan  # of a value: one column of the second head
        else:
            texts.positions[texts.offsets[1] + 4] = -1 if lengths[0] == 20 else 100_000
        after = texts.run(run)
        spoiled = np.isnan(after)
        own = texts.rows(1)
        assert spoiled[own, -1].all() if spoil == "value" else spoiled[own].all()
        assert not spoiled[texts.rows(0)].any() and not spoiled[texts.rows(2)].any()
        for text in (0, 2):
            np.testing.assert_array_equal(after[texts.rows(text)], before[texts.rows(text)])


@pytest.mark.parametrize("lengths", [[20, 30], [300, 20]])
def test_positions_and_offsets_may_come_alone(run: Run, lengths: list[int]) -> None:
    texts = Texts(lengths)
    qkv, cos, sin, _, offsets, token_offset = texts.inputs()
    counted = attention(run, [qkv, cos, sin, None, offsets, token_offset], 2, False)
    np.testing.assert_array_equal(counted, texts.run(run))
    one = Texts(lengths[:1])
    alone = attention(run, [one.qkv, one.cos, one.sin, one.positions[::-1].copy()], 2, False)
    inputs: list[Array | None] = [one.qkv, one.cos, one.sin, one.positions[::-1].copy(), one.offsets]
    hold_attention(alone, inputs, 2, False)


@pytest.mark.parametrize("offsets", [[-5, 30, 10**6], [40, 20, 60], [0, 0, 0], [2**31 - 1, 5, -(2**31)]])
@pytest.mark.usefixtures("products")
def test_offsets_that_are_none_read_nothing_else(run: Run, offsets: list[int]) -> None:
    """What is computed is not defined; memory outside of qkv is not touched (the session would crash)."""
    texts = Texts([30, 270])
    texts.offsets = np.array(offsets, np.int32)
    assert texts.run(run).shape == (300, 128)


@pytest.mark.parametrize("growth", [0.02, 0.5, -0.5], ids=["within the slack", "beyond it", "falling"])
@pytest.mark.parametrize("length", [200, 400])
@pytest.mark.usefixtures("products")
def test_scores_that_grow_from_key_to_key(run: Run, length: int, growth: float) -> None:
    """The largest score so far changes with every tile of keys, by less or by more than kSlack."""
    texts = Texts([length], heads=1)
    texts.cos[:], texts.sin[:] = 1, 0
    texts.qkv[:, :128] = 0
    texts.qkv[:, 0] = 8
    texts.qkv[:, 64] = (np.arange(length) * growth).astype(np.float16)
    texts.hold(run)


@pytest.mark.parametrize("length", [60, 200, 300])
@pytest.mark.usefixtures("products")
def test_keys_that_overflow_have_no_weight(run: Run, length: int) -> None:
    """Turned keys of -inf, all of the first tile: scores of -inf, and the other keys' outputs."""
    texts = Texts([length], heads=1)
    texts.cos[:], texts.sin[:] = 2, 0.5
    texts.qkv[:, :64] = 0
    texts.qkv[:, [0, 32]] = 1
    overflowing = min(100, length - 20)
    texts.qkv[:overflowing, [64, 96]] = -60000
    y = texts.run(run)
    assert np.isfinite(y).all()
    texts.qkv[:overflowing, [64, 96]] = -600
    np.testing.assert_array_equal(y, texts.run(run))


@pytest.mark.parametrize("length", [60, 300])
@pytest.mark.usefixtures("products")
def test_outliers_choose_one_key(run: Run, length: int) -> None:
    """Scores of 10^10: one weight is 1, the others are 0, and none is NaN."""
    texts = Texts([length], heads=1)
    texts.cos[:], texts.sin[:] = 1, 0
    texts.qkv[:, :64] = 2e4
    texts.qkv[7, 64:128] = 6e4
    y = texts.run(run)
    np.testing.assert_array_equal(y, np.broadcast_to(texts.qkv[7, 128:], y.shape))


@pytest.mark.parametrize(
    ("width", "padded"),
    [(2730, 2736), (2736, 2736), (341, 352), (320, 320), (24, 32), (1, 16), (7, 7), (1001, 1001), (3074, 3088)],
)
def test_swiglu_norm(run: Run, width: int, padded: int) -> None:
    rng = np.random.default_rng(width)
    gain, bias = gain_and_bias(rng, width)
    for rows in ROWS:
        gate_up = rng.normal(size=(rows, 2 * padded)) * 10.0 ** rng.uniform(-1, 1, (rows, 1))
        gate_up[0, :width] *= 400  # products beyond 65504, gates below -88 whose exponential overflows
        gate_up[0, padded : padded + width] *= 400
        gate_up = gate_up.astype(np.float16)  # the padding is not zero: it must not count
        (y,) = run("SwigluNorm", [gate_up, gain, bias], [np.float16], epsilon=1e-6)
        expected = references.swiglu_norm(gate_up, gain, bias, 1e-6)
        assert_close(y, expected, norm_error(expected))
        assert not y[:, width:].any()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 2048, 2049, 33 * 4096])
def test_gelu(run: Run, count: int) -> None:
    x = (np.random.default_rng(count).normal(size=(1, count)) * 4).astype(np.float16)
    x[0, : min(4, count)] = [6e4, -6e4, 1e-7, -0.0][: min(4, count)]
    (y,) = run("Gelu", [x], [np.float16])
    expected = references.gelu(x)
    assert_close(y, expected, 2**-18 * np.abs(expected))


def test_gelu_of_every_float16(run: Run) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)]
    (y,) = run("Gelu", [x], [np.float16])
    expected = references.gelu(x)
    assert_close(y, expected, 2**-18 * np.abs(expected))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("k", "n"), [(128, 384), (120, 360), (1024, 72), (24, 8), (7, 65)])
def test_linear(run: Run, k: int, n: int, biased: bool) -> None:
    rng = np.random.default_rng(k)
    weight = (rng.normal(size=(k, n)) / np.sqrt(k)).astype(np.float16)
    bias = rng.normal(size=n).astype(np.float16) if biased else None
    for rows in ROWS:
        x = rows_of(rng, rows, k)
        (y,) = run("Linear", [x, weight, bias], [np.float16])
        sums = references.linear(np.abs(x), np.abs(weight), None if bias is None else np.abs(bias))
        assert_close(y, references.linear(x, weight, bias), 1e-6 * sums)


def test_linear_adds_the_bias_before_it_rounds(run: Run) -> None:
    x, weight = np.full((1, 8), 2048, np.float16), np.ones((8, 8), np.float16)
    bias = np.full(8, 7.0, np.float16)
    (y,) = run("Linear", [x, weight, bias], [np.float16])  # 16391: 16384 if the sum is rounded first
    np.testing.assert_array_equal(y, np.full((1, 8), 16391, np.float16))
    overflowing, negative = np.full((1, 8), 8200, np.float16), np.full(8, -200, np.float16)
    (y,) = run("Linear", [overflowing, weight, negative], [np.float16])  # 65600 - 200
    np.testing.assert_array_equal(y, np.full((1, 8), 65400, np.float16))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("width", [1, 7, 24, 120, 128, 1000, 1024])
def test_mean_pool(run: Run, width: int, dtype: type) -> None:
    rng = np.random.default_rng(width)
    x = rows_of(rng, 150, width, dtype)
    for offsets in ([0, 150], [0, 1, 3, 36, 36, 150], [5, 20], [0, 0], [0]):
        (y,) = run("MeanPool", [x, np.array(offsets, np.int32)], [np.float32])
        expected = references.mean_pool(x, np.array(offsets))
        empty = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(y), empty)
        largest = np.abs(x.astype(np.float64)).max()
        assert_close(np.where(empty, 0, y), np.where(empty, 0, expected), 1e-6 * largest)


@pytest.mark.parametrize("width", [1, 7, 24, 64, 120, 1000, 1024, 2736, 4096])
def test_l2_normalize(run: Run, width: int) -> None:
    rng = np.random.default_rng(width)
    for rows in ROWS:
        x = rows_of(rng, rows, width, np.float32)
        x[0] = 0
        if rows > 2:
            x[2] *= 1e-15  # a norm below 1e-12
        (y,) = run("L2Normalize", [x], [np.float32])
        assert_close(y, references.l2_normalize(x), 1e-6)


def operands(operator: str, rows: int, width: int) -> tuple[list[Array | None], list[type], dict[str, Any]]:
    """Inputs whose first one has `rows` rows, output types and attributes of any operator but MeanPool."""
    rng = np.random.default_rng(rows + width)
    gain, bias = gain_and_bias(rng, width)
    x = rng.normal(size=(rows, width)).astype(np.float16)
    half: list[type] = [np.float16]
    full: list[type] = [np.float32]
    match operator:
        case "LayerNorm":
            return [x, gain, bias], half, {"epsilon": EPSILON}
        case "AddLayerNorm":
            return [x.astype(np.float32), x, gain, bias], full + half, {"epsilon": EPSILON, "keep_norm": 0}
        case "AddPostNorm":
            return [x, x[::-1].copy(), gain, bias], half, {"epsilon": EPSILON}
        case "SplitRotary" | "RotaryAttention":
            qkv = np.concatenate([x, x, x], axis=1)
            head_width, outputs = (8, 3) if operator == "SplitRotary" else (64, 2)
            attributes = {"num_heads": width // head_width, "interleaved": 1}
            return [qkv, *angles_of(rng, max(rows, 1), head_width)], half * outputs, attributes
        case "SwigluNorm":
            return [np.concatenate([x, x], axis=1), gain, bias], half, {"epsilon": EPSILON}
        case "Gelu":
            return [x], half, {}
        case "Linear":
            return [x, rng.normal(size=(width, 16)).astype(np.float16), None], half, {}
        case "L2Normalize":
            return [x.astype(np.float32)], full, {}
    raise AssertionError(operator)


NORMS = ["LayerNorm", "AddLayerNorm", "AddPostNorm", "SwigluNorm", "L2Normalize"]
ROW_OPERATORS = [*NORMS, "Gelu", "Linear"]
TEXT_OPERATORS = ["SplitRotary", "RotaryAttention"]
# inputs with one row for each row of the output
PER_ROW = {"AddLayerNorm": [0, 1], "AddPostNorm": [0, 1]}


@pytest.mark.parametrize("operator", ROW_OPERATORS)
@pytest.mark.parametrize("width", [120, 1024, 2736])
def test_a_row_depends_on_no_other(run: Run, operator: str, width: int) -> None:
    """Each row is bit for bit what it is alone, and NaN stays in its row."""
    inputs, outputs, attributes = operands(operator, 33, width)
    first = inputs[0]
    assert first is not None
    whole = run(operator, inputs, outputs, **attributes)
    for row in (0, 7, 32):
        alone = list(inputs)
        for index in PER_ROW.get(operator, [0]):
            source = inputs[index]
            assert source is not None
            alone[index] = source[row : row + 1]
        for part, single in zip(whole, run(operator, alone, outputs, **attributes), strict=True):
            np.testing.assert_array_equal(part[row : row + 1], single)
    for poison in (np.nan, np.inf):
        changed = first.copy()
        changed[7, 3] = poison
        poisoned = [changed, *inputs[1:]]
        for part, before in zip(run(operator, poisoned, outputs, **attributes), whole, strict=True):
            others = np.arange(33) != 7
            np.testing.assert_array_equal(part[others], before[others])
        if np.isnan(poison):
            assert np.isnan(run(operator, poisoned, outputs, **attributes)[0][7]).any()


@pytest.mark.parametrize("operator", NORMS)
def test_nan_fills_the_row_that_is_normalised(run: Run, operator: str) -> None:
    inputs, outputs, attributes = operands(operator, 3, 1024)
    assert inputs[0] is not None
    inputs[0][1, 1000] = np.nan
    y = run(operator, inputs, outputs, **attributes)[-1]
    np.testing.assert_array_equal(np.isnan(y).all(axis=1), [False, True, False])


@pytest.mark.parametrize("operator", ROW_OPERATORS)
def test_leading_dimensions_are_rows(run: Run, operator: str) -> None:
    inputs, outputs, attributes = operands(operator, 6, 120)
    shaped = list(inputs)
    for index in PER_ROW.get(operator, [0]):
        source = inputs[index]
        assert source is not None
        shaped[index] = source.reshape(2, 3, *source.shape[1:])
    for flat, deep in zip(
        run(operator, inputs, outputs, **attributes), run(operator, shaped, outputs, **attributes), strict=True
    ):
        np.testing.assert_array_equal(flat.reshape(2, 3, -1), deep)


@pytest.mark.parametrize("operator", ROW_OPERATORS)
@pytest.mark.parametrize("width", [128, 1000, 1024, 2736])
def test_many_rows(run: Run, operator: str, width: int) -> None:
    """4096 rows of few different ones, for which other shapes of blocks are launched: the same bits."""
    if operator == "Linear" and width > 128:
        pytest.skip("one path for all numbers of rows")
    inputs, outputs, attributes = operands(operator, 64, width)
    many = list(inputs)
    for index in PER_ROW.get(operator, [0]):
        source = inputs[index]
        assert source is not None
        many[index] = np.tile(source, (64, *[1] * (source.ndim - 1)))
    few = run(operator, inputs, outputs, **attributes)
    for part, whole in zip(few, run(operator, many, outputs, **attributes), strict=True):
        np.testing.assert_array_equal(whole, np.tile(part, (64, 1)))


@pytest.mark.parametrize("operator", [*ROW_OPERATORS, *TEXT_OPERATORS])
def test_no_rows(run: Run, operator: str) -> None:
    inputs, outputs, attributes = operands(operator, 0, 128)
    for answer in run(operator, inputs, outputs, **attributes):
        assert answer.size == 0
        assert answer.shape[0] == 0


@pytest.mark.parametrize("operator", [*ROW_OPERATORS, "SplitRotary"])
@pytest.mark.parametrize("width", [120, 1024, 2736])
def test_misaligned_memory(run: Run, operator: str, width: int) -> None:
    """The path without vector accesses computes the same but for the order of its sums."""
    inputs, outputs, attributes = operands(operator, 5, width)
    moved = [None if x is None else misaligned(x) for x in inputs]
    for aligned, other in zip(
        run(operator, inputs, outputs, **attributes), run(operator, moved, outputs, **attributes), strict=True
    ):
        np.testing.assert_allclose(other.astype(np.float64), aligned.astype(np.float64), rtol=2e-3, atol=1e-5)


def test_attention_refuses_memory_that_is_not_aligned(run: Run) -> None:
    inputs, outputs, attributes = operands("RotaryAttention", 5, 128)
    assert inputs[0] is not None
    with pytest.raises(Fail, match="multiple of 16 bytes"):
        run("RotaryAttention", [misaligned(inputs[0]), *inputs[1:]], outputs, **attributes)


ONE_HEAD = {"num_heads": 1, "interleaved": 0}


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs", "attributes", "text"),
    [
        ("LayerNorm", [(2, 8), (7,), (8,)], 1, {"epsilon": 1e-5}, "vector"),
        ("AddLayerNorm", [(2, 8), (1, 8), (8,), (8,)], 2, {"epsilon": 1e-5, "keep_norm": 0}, "shapes"),
        ("AddPostNorm", [(1, 8), (2, 8), (8,), (8,)], 1, {"epsilon": 1e-5}, "shapes"),
        ("AddPostNorm", [(7,), (2, 8), (8,), (8,)], 1, {"epsilon": 1e-5}, "shapes"),
        ("SplitRotary", [(2, 25), (4, 4), (4, 4)], 3, {"num_heads": 1, "interleaved": 0}, "heads"),
        ("SplitRotary", [(2, 24), (4, 3), (4, 3)], 3, {"num_heads": 1, "interleaved": 0}, "cos and sin"),
        ("SplitRotary", [(5, 24), (4, 4), (4, 4)], 3, {"num_heads": 1, "interleaved": 0}, "positions"),
        ("RotaryAttention", [(2, 96), (4, 32), (4, 32)], 2, ONE_HEAD, "64"),
        ("RotaryAttention", [(2, 192), (4, 31), (4, 31)], 2, ONE_HEAD, "cos and sin"),
        ("RotaryAttention", [(2, 192), (0, 32), (0, 32)], 2, ONE_HEAD, "cos and sin"),
        ("RotaryAttention", [(5, 192), (4, 32), (4, 32)], 2, ONE_HEAD, "more positions"),
        ("RotaryAttention", [(5, 192), (9, 32), (9, 32), (4,)], 2, ONE_HEAD, "positions does"),
        ("RotaryAttention", [(5, 192), (9, 32), (9, 32), (5,), (3,)], 2, ONE_HEAD, "without"),
        ("RotaryAttention", [(5, 192), (9, 32), (9, 32), (5,), (3,), (1, 5)], 2, ONE_HEAD, "token_offset"),
        ("SwigluNorm", [(2, 8), (5,), (5,)], 1, {"epsilon": 1e-5}, "half"),
        ("SwigluNorm", [(2, 7), (3,), (3,)], 1, {"epsilon": 1e-5}, "odd"),
        ("Linear", [(2, 8), (7, 8)], 1, {}, "weight"),
        ("MeanPool", [(2, 8), (0,)], 1, {}, "offsets"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    run: Run, operator: str, inputs: list[tuple[int, ...]], outputs: int, attributes: dict[str, Any], text: str
) -> None:
    types = {
        "LayerNorm": "efff",
        "AddLayerNorm": "feff",
        "AddPostNorm": "eeff",
        "SplitRotary": "eff",
        "RotaryAttention": "effiii",
        "SwigluNorm": "eff",
        "Linear": "ee",
        "MeanPool": "fi",
    }[operator]
    arrays: list[Array | None] = [np.ones(shape, kind) for shape, kind in zip(inputs, types, strict=False)]
    kinds: list[type] = [np.float32, np.float16] if operator == "AddLayerNorm" else [np.float16] * outputs
    if operator == "MeanPool":
        kinds = [np.float32]
    with pytest.raises(InvalidArgument, match=text):
        run(operator, arrays, kinds, **attributes)


def test_a_missing_attribute_is_named(run: Run) -> None:
    x, vector = np.ones((2, 8), np.float16), np.ones(8, np.float32)
    with pytest.raises(RuntimeException, match="epsilon"):
        run("LayerNorm", [x, vector, vector], [np.float16])


def test_every_kernel_waits_for_the_one_in_front() -> None:
    """A kernel that is launched early and does not wait reads unwritten data; the host build does not show it."""
    kernels = []
    for path in sorted(SOURCES.glob("*.cu")):
        text = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
        bounds = r"(?:__launch_bounds__\([^)]*\)\s*)?"
        kernels += re.findall(rf"__global__ void {bounds}(\w+)\([^)]*\) \{{\s*([^;]*;)?", text)
    assert len(kernels) > 15
    assert {name for name, first in kernels if first != "begin_kernel();"} == {"probe"}  # probe is never launched


@pytest.mark.slow
def test_the_cuda_library_builds(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    command = [sys.executable, str(SOURCES / "build.py"), "--arch", "90", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    if "cublasLt.h" in result.stderr and "is not found" in result.stderr:
        pytest.skip("no header of cuBLAS")
    assert result.returncode == 0, result.stderr
    content = Path(result.stdout.strip()).read_bytes()
    for name in (b"RegisterCustomOps", b"jinaclip_cuda_device_error", b"libcublasLt.so.13", b"libcudart.so.13"):
        assert name in content
