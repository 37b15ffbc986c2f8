"""The passes of jinaclip_engines: equal output for a backend's, bounded error for a precision's, and red when broken.

References: the standard graph itself in ONNX Runtime, numpy for single layers. tests/engines/test_outliers.py has
checkpoints with extreme weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from jinaclip import ClipModel
from jinaclip.backends.onnxruntime.cpu import OnnxRuntimeSession
from jinaclip.errors import SelfTestFailed
from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import Ops, array, linears, nodes, read, write
from jinaclip_engines.passes.onnxruntime_cpu import PASSES, TILED_ABOVE, for_cpu
from jinaclip_engines.precision.activation_ranges import channel_ranges
from jinaclip_engines.precision.int8 import OUTLIER_RATIO, outlier_channels, quantise_columns, to_int8
from tests.conftest import TEXTS

HEADS = 2  # of both small towers
RNG = np.random.default_rng(0)


def text_batches(vocabulary: int = 36000) -> list[np.ndarray]:
    """Ids with and without padding, short and long enough for tiles."""
    padded = RNG.integers(4, vocabulary, (3, 20))
    padded[1, 5:] = 1
    padded[2, 1:] = 1
    long = RNG.integers(4, vocabulary, (2, TILED_ABOVE + 90))
    long_padded = long.copy()
    long_padded[1, 30:] = 1
    return [padded, RNG.integers(4, vocabulary, (1, 1)), long, long_padded]


def image_batches() -> list[np.ndarray]:
    return [RNG.integers(0, 256, (n, 140, 140, 3), np.uint8) for n in (1, 3)]


def run(path: Path, batch: np.ndarray) -> dict[str, np.ndarray]:
    session = OnnxRuntimeSession(path)
    try:
        return session.run({"input_ids" if batch.ndim == 2 else "pixel_values": batch})
    finally:
        session.close()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found: np.ndarray = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return found


# Passes for a CPU: equal output


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("last", range(1, len(PASSES) + 1))
def test_cpu_passes_leave_the_vectors(
    precise_bundle: Path, tmp_path: Path, tower: str, precision: str, last: int
) -> None:
    source = precise_bundle / f"{tower}-{precision}.onnx"
    model = read(source)
    counts = for_cpu(model, HEADS, list(PASSES)[:last])
    blocks = 3
    expected = {
        "token_major": blocks,
        "unpad": blocks if tower == "text" else 0,
        "tile_attention": blocks,
        "last_block_for_cls": int(tower == "image"),
        "integer_gemm": 0 if precision == "fp32" else blocks * (4 if tower == "text" else 7),
    }
    assert counts == {name: expected[name] for name in counts}
    rewritten = tmp_path / "rewritten.onnx"
    write(model, rewritten)
    for batch in text_batches() if tower == "text" else image_batches():
        before, after = run(source, batch), run(rewritten, batch)
        for name, values in before.items():
            unit = values / np.linalg.norm(values, axis=-1, keepdims=True)
            found = after[name] / np.linalg.norm(after[name], axis=-1, keepdims=True)
            if precision == "fp32":  # other sums of the same numbers
                assert np.abs(unit - found).max() <= 1e-6
            else:  # where float32's last digits differ, a value may round to the next of 255 steps
                assert cosines(unit, found).min() >= 0.9995


def test_tiles_are_used_for_long_texts_without_padding_only(precise_bundle: Path, tmp_path: Path) -> None:
    model = read(precise_bundle / "text-fp32.onnx")
    for_cpu(model, HEADS)
    for branch in nodes(model, "If"):
        other = branch.attributes["else_branch"].value
        other.node(0).op_type = "NoSuchOperator"  # the kernel with a mask is gone ...
    write_unchecked = tmp_path / "broken.onnx"
    ir.save(model, write_unchecked, external_data="broken.onnx.data")
    with pytest.raises(Exception, match="NoSuchOperator"):
        OnnxRuntimeSession(write_unchecked)
    graph = onnx.load(precise_bundle / "text-fp32.onnx", load_external_data=False)
    assert sum(node.op_type == "Attention" for node in graph.graph.node) == 3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_linear_layers_see_no_padding(precise_bundle: Path, tmp_path: Path, precision: str) -> None:
    model = read(precise_bundle / f"text-{precision}.onnx")
    for_cpu(model, HEADS)
    products = [node for node in model.graph if node.op_type in ("MatMul", "MatMulIntegerToFloat")]
    assert len(products) == 3 * 4
    model.graph.outputs.extend(node.inputs[0] for node in products if node.inputs[0] is not None)
    for value in model.graph.outputs[2:]:
        value.type = ir.TensorType(ir.DataType.FLOAT if precision == "fp32" else ir.DataType.UINT8)
        value.shape = ir.Shape([None, None, None])
    write(model, tmp_path / "seen.onnx")
    for batch in text_batches():
        seen = list(run(tmp_path / "seen.onnx", batch).values())[2:]
        assert {x.shape[:2] for x in seen} == {(1, (batch != 1).sum())}


def test_padding_changes_nothing(precise_bundle: Path, tmp_path: Path) -> None:
    """Wherever it stands and however much there is of it: rows of a padded batch are those of the texts alone."""
    model = read(precise_bundle / "text-fp32.onnx")
    for_cpu(model, HEADS)
    write(model, tmp_path / "rewritten.onnx")
    batch = RNG.integers(4, 36000, (4, 40))
    batch[0, 1:] = batch[1, 20:] = 1
    batch[2, :7] = batch[2, 11] = 1  # places count: such a row is nothing but itself
    found = run(tmp_path / "rewritten.onnx", batch)["l2norm_text_embeddings"]
    for row, vector in zip(batch, found, strict=True):
        alone = row[:1] if row is batch[0] else row
        expected = run(precise_bundle / "text-fp32.onnx", alone[None])["l2norm_text_embeddings"][0]
        assert np.abs(expected - vector).max() <= 1e-6


def test_a_graph_that_is_no_standard_graph_is_refused(precise_bundle: Path) -> None:
    model = read(precise_bundle / "text-fp32.onnx")
    attention = nodes(model, "Attention")[0]
    with Ops(model, before=attention) as op:
        attention.replace_input_with(0, op("Neg", [attention.inputs[0]]))
    with pytest.raises(PassError, match="not between a standard graph's reshapes"):
        for_cpu(model, HEADS)


@pytest.mark.parametrize(
    ("operator", "index", "message"),
    [
        ("Expand", 0, "the attention mask is not expanded"),
        ("RotaryEmbedding", 0, "does not compute q, k and v in one product"),
        ("LayerNormalization", -1, "does not compute the mean"),
    ],
)
def test_a_graph_that_padding_cannot_be_left_out_of_is_refused(
    precise_bundle: Path, operator: str, index: int, message: str
) -> None:
    model = read(precise_bundle / "text-fp32.onnx")
    for_cpu(model, HEADS, ["token_major"])
    node = nodes(model, operator)[index]
    with Ops(model, before=next(iter(node.outputs[0].uses())).node) as op:
        op.replace(node.outputs[0], op("Identity", [node.outputs[0]]))
    with pytest.raises(PassError, match=message):
        for_cpu(model, HEADS, ["unpad"])


# int8


def test_an_int8_layer_is_what_its_formula_says(tmp_path: Path) -> None:
    """One linear layer against numpy: rows by their own scale, columns by theirs, an outlier channel in float32."""
    x = RNG.standard_normal((2, 5, 64)).astype(np.float32)
    x[..., 7] *= 300
    weight = RNG.standard_normal((64, 48)).astype(np.float32)
    bias = RNG.standard_normal(48).astype(np.float32)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w"], ["m"]),
            onnx.helper.make_node("Add", ["m", "tower.layer.bias"], ["y"]),
        ],
        "layer",
        [onnx.helper.make_tensor_value_info("x", 1, ["b", "t", 64])],
        [onnx.helper.make_tensor_value_info("y", 1, ["b", "t", 48])],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "tower.layer.bias")],
    )
    source = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(source, tmp_path / "fp32.onnx")
    model = read(tmp_path / "fp32.onnx")
    assert to_int8(model, {"x": np.abs(x).max((0, 1))}) == ([], {"layer": 1})
    write(model, tmp_path / "int8.onnx")
    found = OnnxRuntimeSession(tmp_path / "int8.onnx").run({"x": x})["y"]

    ordinary, kept = x.astype(np.float64).copy(), np.zeros_like(x, np.float64)
    ordinary[..., 7], kept[..., 7] = 0, x[..., 7]
    scale = np.abs(ordinary).max(-1, keepdims=True) / 127
    w = weight.astype(np.float64).copy()
    w[7] = 0
    columns = np.abs(w).max(0) / 127
    expected = (np.rint(ordinary / scale) * scale) @ (np.rint(w / columns) * columns) + kept @ weight + bias
    # A value halfway between two steps may round either way in float32: one step of one value.
    step = float(scale.max() * np.abs(w).max())
    assert np.abs(found - expected).max() <= step
    assert np.abs(found - expected).mean() <= 1e-4 * np.abs(expected).mean()
    exact = x.astype(np.float64) @ weight + bias
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact - bias) < 0.02


def test_columns_are_quantised_to_the_nearest_of_255_steps() -> None:
    weight = RNG.standard_normal((100, 7)).astype(np.float32)
    weight[:, 3] = 0
    values, scale = quantise_columns(weight)
    assert values.dtype == np.int8 and np.abs(values.astype(int)).max() == 127 and not values[:, 3].any()
    assert (np.abs(values * scale - weight) <= scale * 0.5001).all()


def test_outlier_channels_are_those_far_above_the_median() -> None:
    largest = np.ones(50, np.float32)
    largest[[3, 40]] = OUTLIER_RATIO * 1.01, OUTLIER_RATIO * 0.99
    assert outlier_channels(largest).tolist() == [3]
    assert outlier_channels(np.zeros(4, np.float32)).tolist() == []


def test_ranges_are_the_largest_of_each_channel(precise_bundle: Path) -> None:
    path = precise_bundle / "text-fp32.onnx"
    layer = linears(read(path))[0]
    assert layer.name == "blocks.0.qkv"
    batches = [{"input_ids": RNG.integers(4, 36000, (2, 9))} for _ in range(3)]
    name = layer.x.name or ""
    ranges, outputs = channel_ranges(path, [name], batches)
    found = ranges[name]
    alone = [channel_ranges(path, [name], [batch])[0][name] for batch in batches]
    assert found.shape == (128,)
    np.testing.assert_array_equal(found, np.max(alone, axis=0))
    # The first layer reads a LayerNorm: its channels stay near gain and bias.
    assert found.min() > 1 and found.max() < 8
    for batch, output in zip(batches, outputs, strict=True):
        expected = run(path, batch["input_ids"])
        assert output.keys() == expected.keys()
        np.testing.assert_allclose(output["text_embeddings"], expected["text_embeddings"], atol=1e-5)
    assert not list(path.parent.glob(".*probe*"))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_row_does_not_depend_on_its_neighbours(precise_bundle: Path, precision: str) -> None:
    """Beside an outlier the bounds of docs/decisions/012: fp16 0.99999, int8 0.9999."""
    least = {"fp16": 0.99999, "int8": 0.9999}[precision]
    with ClipModel(precise_bundle, precision=precision) as model:
        hostile = "\U0001f600龘 ¶¶¶ ZZZZ " * 30
        alone = np.stack([model.encode_text(text) for text in TEXTS])
        beside = np.stack([model.encode_text([text, hostile], batch_size=2)[0] for text in TEXTS])
        assert cosines(alone, beside).min() >= least
        pictures = [np.asarray(p) for p in image_batches()[1]]
        noise = RNG.integers(0, 2, (140, 140, 3), np.uint8) * np.uint8(255)
        alone = np.stack([model.encode_image(picture) for picture in pictures])
        beside = np.stack([model.encode_image([picture, noise], batch_size=2)[0] for picture in pictures])
        assert cosines(alone, beside).min() >= least


def test_types_are_said_in_the_fp16_graph(precise_bundle: Path) -> None:
    """float16 where matrices are multiplied, float32 everywhere else; read from the file, nothing is left to a flag."""
    for tower in ("text", "image"):
        model = onnx.shape_inference.infer_shapes(onnx.load(precise_bundle / f"{tower}-fp16.onnx"))
        types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
        types |= {v.name: v.data_type for v in model.graph.initializer}
        half = onnx.TensorProto.FLOAT16
        by_type: dict[str, set[int]] = {}
        for node in model.graph.node:
            by_type.setdefault(node.op_type, set()).add(types.get(node.input[0], 0))
        assert by_type["MatMul"] == {half}
        for operator in ("Attention", "LayerNormalization", "RotaryEmbedding", "Sqrt"):
            assert by_type[operator] == {onnx.TensorProto.FLOAT}, operator
        assert all(types[v.name] == onnx.TensorProto.FLOAT for v in model.graph.output)
        attention = [node for node in model.graph.node if node.op_type == "Attention"]
        producers = {name: node for node in model.graph.node for name in node.output}
        for node in attention:  # Cast(f16) -> Cast(f32) before q, k and v: the form that GPU compilers fuse
            for name in node.input[:3]:
                assert producers[name].op_type == "Cast" and types[producers[name].input[0]] == half


# A graph that computes something else is refused in every precision


def without_rotary(model: ir.Model) -> None:
    for node in nodes(model, "RotaryEmbedding"):
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]


def without_mask(model: ir.Model) -> None:
    for node in nodes(model, "Attention"):
        node.replace_input_with(3, None)


def without_position_embedding(model: ir.Model) -> None:
    for node in nodes(model, "Add"):
        if any(v is not None and v.name == "tower.pos_embed" and array(v) is not None for v in node.inputs):
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    ("tower", "damage"),
    [
        ("text", without_rotary),
        ("text", without_mask),
        ("image", without_rotary),
        ("image", without_position_embedding),
    ],
)
def test_a_damaged_graph_is_refused(
    precise_bundle: Path, tmp_path: Path, tower: str, damage: Callable[[ir.Model], None], precision: str
) -> None:
    from tests.export.test_certify import register

    copy = Path(shutil.copytree(precise_bundle, tmp_path / "bundle"))
    model = read(precise_bundle / f"{tower}-{precision}.onnx")
    damage(model)
    for path in copy.glob(f"{tower}-{precision}.onnx*"):
        path.unlink()
    write(model, copy / f"{tower}-{precision}.onnx")
    register(copy, tower, precision)
    with pytest.raises(SelfTestFailed, match="the error of"):
        ClipModel(copy, towers=(tower,), precision=precision)
