"""Graphs of `for_cuda`: over the CUDA operators, run here on their host build, and over ONNX Runtime's own.

References: the bundle's fp16 and fp32 graphs in ONNX Runtime. On a CPU ONNX Runtime computes some float16 operators of
its own in float32: what a GPU rounds there is certified on the GPU (tests/gpu).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image

from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import (
    JINACLIP,
    MICROSOFT,
    Ops,
    attributes,
    constant,
    linears,
    nodes,
    patch_product,
    producer,
    read,
    tidy,
    write,
)
from jinaclip_engines.passes.onnxruntime_cuda.pipeline import for_cuda
from jinaclip_engines.precision.activation_ranges import channel_ranges
from jinaclip_engines.precision.fp16 import to_fp16
from jinaclip_export.bundle.manifest import Identity
from jinaclip_export.bundle.writer import export_bundle
from jinaclip_export.checkpoint.random_weights import SIZES
from jinaclip_export.checkpoint.reader import Checkpoint
from tests.conftest import PHOTOS, MakeCheckpoint
from tests.engines.test_gpu_graphs import CUDNN, batches, cosines, run, with_cudnn
from tests.engines.test_outliers import checkpoint_of, outliers
from tests.support.cuda_operator_graphs import packed, run_operators
from tests.support.parity import CONFIGURATIONS

HEADS = 2  # of both small towers
RNG = np.random.default_rng(0)
LEAST = 0.9999  # cosine with the fp16 and the fp32 graph
PAD = 1


def fused(source: Path, directory: Path, heads: int = HEADS, *, operators: bool = True) -> tuple[Path, dict[str, int]]:
    model = read(source)
    counts = for_cuda(model, heads, operators)
    path = directory / f"fused-{source.name}"
    for stale in directory.glob(f"{path.stem}*"):
        stale.unlink()
    write(model, path)
    return path, counts


def run_fused(path: Path, library: Path, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Of a picture graph, or of a text graph in either form, from ids [B, T] with padding."""
    names = {value.name for value in read(path).graph.inputs}
    if "pixel_values" in names:
        return run_operators(path, library, {"pixel_values": batch})
    texts = packed([row[row != PAD] for row in batch]) if "offsets" in names else {"input_ids": batch}
    return run_operators(path, library, texts)


def photos(size: int) -> np.ndarray:
    """uint8 [5, size, size, 3]."""
    return np.stack([np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in PHOTOS])


def hold(bundle: Path, tower: str, library: Path, path: Path, batch: np.ndarray, least: float = LEAST) -> None:
    found = run_fused(path, library, batch)
    for precision in ("fp16", "fp32"):
        expected = run(bundle / f"{tower}-{precision}.onnx", batch)
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert values.dtype == np.float32 and values.shape == expected[name].shape
            smallest = float(cosines(values, expected[name]).min())
            print(f"{tower} {name} {batch.shape}: cosine with {precision} {smallest:.7f}")
            assert smallest >= least
    assert np.abs(np.linalg.norm(found[f"l2norm_{tower}_embeddings"], axis=1) - 1).max() <= 1e-6


@pytest.mark.parametrize("tower", ["text", "image"])
def test_the_bundles_vectors(precise_bundle: Path, host_operators: Path, tmp_path: Path, tower: str) -> None:
    path, counts = fused(precise_bundle / f"{tower}-fp16.onnx", tmp_path)
    assert counts["fused_operators"] == 3 and counts["packed_text"] == (3 if tower == "text" else 0)
    for batch in [*batches(tower), *([photos(140)] if tower == "image" else [])]:
        hold(precise_bundle, tower, host_operators, path, batch, 0.99999)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_what_is_in_the_graph(precise_bundle: Path, tmp_path: Path, tower: str) -> None:
    """No float32 product, no cast in a block, at most nine nodes each; no operator that needs cuDNN."""
    path, _ = fused(precise_bundle / f"{tower}-fp16.onnx", tmp_path)
    model = read(path)
    found = Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in model.graph)
    assert not CUDNN & found.keys() and "MatMul" not in found and "LayerNormalization" not in found
    for node in nodes(model, "Linear", JINACLIP):
        weight, bias = (constant(value) for value in node.inputs[1:])
        assert weight.dtype == bias.dtype == np.float16 and weight.shape[1] == len(bias)
    operators = {
        "image": {"Linear": 4, "LayerNorm": 1, "AddLayerNorm": 2, "RotaryAttention": 1, "SwigluNorm": 1},
        "text": {"Linear": 4, "AddPostNorm": 2, "RotaryAttention": 1, "Gelu": 1},
    }[tower]
    beyond = {
        # the last block has a query for the class token alone
        "image": {"Linear": 1, "AddLayerNorm": 1, "L2Normalize": 1, "SplitRotary": 1, "RotaryAttention": -1},
        "text": {"AddPostNorm": 1, "MeanPool": 1, "L2Normalize": 1},
    }[tower]
    expected = Counter(beyond)
    for name, count in operators.items():
        expected[name] += 3 * count
    assert expected == Counter({name.removeprefix("jinaclip."): n for name, n in found.items() if "jinaclip." in name})
    order = list(model.graph)
    starts = [order.index(node) for node in nodes(model, "RotaryAttention", JINACLIP)]
    assert starts[1] - starts[0] == (9 if tower == "image" else 8)
    assert found["Cast"] == (1 if tower == "image" else 0)  # uint8 to float16
    if tower == "text":
        assert "Attention" not in found
        inputs = {v.name: (v.dtype, [str(d) for d in v.shape or ()]) for v in model.graph.inputs}
        int32 = ir.DataType.INT32
        assert inputs == {
            "input_ids": (ir.DataType.INT64, ["tokens"]),
            "positions": (int32, ["tokens"]),
            "offsets": (int32, ["offsets"]),
            "token_offset": (int32, ["batch", "longest"]),
        }
    for node in nodes(model, "Attention"):
        assert len(node.inputs) == 3 and attributes(node)["q_num_heads"] == HEADS
    for node in nodes(model, "SwigluNorm", JINACLIP):  # 341 columns are padded to 352
        assert constant(node.inputs[1]).size == 341
        before, after = node.inputs[0], node.outputs[0]
        assert constant(before.producer().inputs[1]).shape == (128, 704)  # type: ignore[union-attr]
        padded = constant(next(iter(after.uses())).node.inputs[1])
        assert padded.shape == (352, 128) and not padded[341:].any()


@pytest.mark.parametrize("tower", ["text", "image"])
def test_the_published_width_and_picture_size(
    wide_bundle: Path, host_operators: Path, tmp_path: Path, tower: str
) -> None:
    path, counts = fused(wide_bundle / f"{tower}-fp16.onnx", tmp_path, 16)
    assert counts["fused_operators"] == 2
    hold(wide_bundle, tower, host_operators, path, photos(512)[:1] if tower == "image" else batches("text")[0])


def test_widths_that_are_no_powers_of_two(
    make_checkpoint: MakeCheckpoint, host_operators: Path, tmp_path: Path
) -> None:
    """Width 120, heads of 24 and 40, one image block, patches of 16 in a picture of 100."""
    _, dim, text, vision = CONFIGURATIONS["odd"]
    bundle = tmp_path / "bundle"
    checkpoint = Checkpoint(make_checkpoint(dim, text=text, vision=vision))
    export_bundle(checkpoint, bundle, identity=Identity("odd", None, None), precisions=("fp32", "fp16"))
    path, counts = fused(bundle / "text-fp16.onnx", tmp_path, text["num_attention_heads"])
    assert counts["packed_text"] == 0 and not nodes(read(path), "RotaryAttention", JINACLIP)
    ids = np.where(batches("text")[0] == PAD, PAD, batches("text")[0] % 30000 + 4)
    hold(bundle, "text", host_operators, path, ids)
    path, counts = fused(bundle / "image-fp16.onnx", tmp_path, 3)
    assert counts["fused_operators"] == 1
    hold(bundle, "image", host_operators, path, photos(100))


def test_neighbours_change_nothing(precise_bundle: Path, host_operators: Path, tmp_path: Path) -> None:
    """In batches of one shape, with other texts or pictures, the last text only pad tokens: the same bits. Alone, other
    sums round to float16 otherwise.
    """
    path, _ = fused(precise_bundle / "text-fp16.onnx", tmp_path)
    text = RNG.integers(4, 36000, 40)
    lengths = (1, 7, 300, 34)
    found = []
    for _ in range(2):
        others = [RNG.integers(4, 36000, n) for n in lengths[:3]]
        given = packed([others[0], text, *others[1:], np.full(lengths[3], PAD)])
        found.append(run_operators(path, host_operators, given)["l2norm_text_embeddings"])
    assert np.array_equal(found[0][1], found[1][1]) and not np.array_equal(found[0][3], found[1][3])
    alone = run_operators(path, host_operators, packed([text]))["l2norm_text_embeddings"][0]
    assert np.abs(found[0][1] - alone).max() <= 5e-4
    path, _ = fused(precise_bundle / "image-fp16.onnx", tmp_path)
    picture = photos(140)[0]
    found = []
    for most in (2, 256):
        noise = RNG.integers(0, most, (2, 140, 140, 3), np.uint8) * np.uint8(255 // (most - 1))
        batch = np.stack([noise[0], picture, noise[1]])
        found.append(run_fused(path, host_operators, batch)["l2norm_image_embeddings"])
    assert np.array_equal(found[0][1], found[1][1]) and not np.array_equal(found[0][0], found[1][0])
    alone = run_fused(path, host_operators, picture[None])["l2norm_image_embeddings"][0]
    assert np.abs(found[0][1] - alone).max() <= 5e-4


@pytest.mark.parametrize("operators", [True, False], ids=["operators", "standard"])
def test_tokens_and_texts_that_fill_up_a_shape(
    precise_bundle: Path, host_operators: Path, tmp_path: Path, operators: bool
) -> None:
    """Rows behind the last text, and texts without tokens, change nothing."""
    path, _ = fused(precise_bundle / "text-fp16.onnx", tmp_path, operators=operators)
    texts = [RNG.integers(4, 36000, length) for length in (1, 7, 40)]
    given = packed(texts)
    filled = packed([*texts, np.full(9, PAD)])
    filled["positions"][-9:] = 0
    filled["offsets"] = np.append(given["offsets"], [given["offsets"][-1]] * 2).astype(np.int32)
    filled["token_offset"] = np.zeros((5, 64), np.int32)
    found, expected = (run_operators(path, host_operators, inputs) for inputs in (filled, given))
    for name, values in found.items():
        assert len(values) == 5 and cosines(values[:3], expected[name]).min() >= 0.999999


def test_a_run_may_have_more_tokens_than_a_text(precise_bundle: Path, tmp_path: Path) -> None:
    """Without the operators: RotaryEmbedding refuses a row of more tokens than its tables have positions."""
    model = read(fused(precise_bundle / "text-fp16.onnx", tmp_path, operators=False)[0])
    for value in {value for node in nodes(model, "RotaryEmbedding") for value in node.inputs[1:3] if value}:
        assert value.name is not None
        table = constant(value)[:32]
        value.const_value, value.shape = ir.tensor(table, name=value.name), ir.Shape(table.shape)
    write(model, tmp_path / "short-tables.onnx")
    texts = [RNG.integers(4, 36000, length) for length in (30, 32, 5)]
    found = run_operators(tmp_path / "short-tables.onnx", None, packed(texts))["l2norm_text_embeddings"]
    path, _ = fused(precise_bundle / "text-fp16.onnx", tmp_path, operators=False)
    expected = run_operators(path, None, packed(texts))["l2norm_text_embeddings"]
    np.testing.assert_array_equal(found, expected)


def test_nan_and_infinity_stay_in_their_text_without_the_operators(precise_bundle: Path, tmp_path: Path) -> None:
    """The means of packed texts alone: the tokens' values are made an input."""
    model = read(fused(precise_bundle / "text-fp16.onnx", tmp_path, operators=False)[0])
    (difference,) = (node for node in nodes(model, "Sub") if node.inputs[0] is node.inputs[1])
    values = difference.inputs[0]
    assert values is not None
    given = ir.Value(name="values", shape=ir.Shape(["tokens", 128]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(given)
    ir.convenience.replace_all_uses_with(values, given)
    tidy(model)
    write(model, tmp_path / "means.onnx")
    inputs = packed([RNG.integers(4, 36000, length) for length in (3, 5, 2)])
    tokens = RNG.standard_normal((10, 128), np.float32)
    expected = run_operators(tmp_path / "means.onnx", None, inputs | {"values": tokens})["text_embeddings"]
    for text, rows in enumerate((tokens[:3], tokens[3:8], tokens[8:])):
        np.testing.assert_allclose(expected[text], rows.mean(0), rtol=1e-5, atol=1e-6)
    for spoil in (np.nan, np.inf, -np.inf):
        spoiled = tokens.copy()
        spoiled[4, 7] = spoil
        found = run_operators(tmp_path / "means.onnx", None, inputs | {"values": spoiled})["text_embeddings"]
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


def lowered(bundle: Path, tower: str, directory: Path, keep: Collection[str], large: str = "") -> Path:
    """The fp16 graph with blocks kept in float32, or one layer whose values are too large for float16."""
    model = read(bundle / f"{tower}-fp32.onnx")
    ranges = {value.name or "": np.ones(1, np.float32) for layer in linears(model) for value in (layer.x, layer.y)}
    for layer in linears(model):
        if layer.name == large:
            ranges[layer.y.name or ""] = np.full(1, 1e5, np.float32)
    to_fp16(model, ranges, keep)
    path = directory / f"{tower}-fp16.onnx"
    for stale in directory.glob(f"{tower}-fp16.onnx*"):
        stale.unlink()
    write(model, path)
    return path


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("keep", ["0", "1", "2", "01", "12", "02"])
def test_blocks_in_float32_stay(
    precise_bundle: Path, host_operators: Path, tmp_path: Path, tower: str, keep: str
) -> None:
    """The stream passes through them; a text graph then takes padding."""
    source = lowered(precise_bundle, tower, tmp_path, [f"blocks.{index}" for index in keep])
    path, counts = fused(source, tmp_path)
    assert counts["fused_operators"] == 3 - len(keep) and counts["packed_text"] == 0
    model = read(path)
    assert len(nodes(model, "MatMul")) >= len(keep) * (4 if tower == "text" else 7)
    batch = batches(tower)[0]
    before, after = run(source, batch), run_fused(path, host_operators, batch)
    exact = run(precise_bundle / f"{tower}-fp32.onnx", batch)
    for name, values in after.items():
        assert cosines(values, before[name]).min() >= 0.99999
        assert cosines(values, exact[name]).min() >= 0.99999
    if tower == "text":
        further = np.concatenate([batch, np.full((len(batch), 100), PAD)], 1)
        padded = run_fused(path, host_operators, further)["l2norm_text_embeddings"]
        assert np.abs(padded - after["l2norm_text_embeddings"]).max() <= 1e-6


@pytest.mark.parametrize(("tower", "layer"), [("text", "fc1"), ("image", "v"), ("image", "down")])
def test_a_block_with_one_layer_in_float32_stays(
    precise_bundle: Path, host_operators: Path, tmp_path: Path, tower: str, layer: str
) -> None:
    source = lowered(precise_bundle, tower, tmp_path, (), f"blocks.1.{layer}")
    path, counts = fused(source, tmp_path)
    assert counts["fused_operators"] == 2 and counts["packed_text"] == 0
    batch = batches(tower)[0]
    before, after = run(source, batch), run_fused(path, host_operators, batch)
    for name, values in after.items():
        assert cosines(values, before[name]).min() >= 0.99999


def export(checkpoint: Checkpoint, directory: Path, towers: tuple[str, ...] = ("text", "image"), **more: Any) -> Path:
    path = directory / "bundle"
    identity = Identity("random", None, None)
    export_bundle(checkpoint, path, identity=identity, towers=towers, precisions=("fp32", "fp16"), **more)
    return path


BOTH = pytest.mark.parametrize("operators", [True, False], ids=["operators", "standard"])


@BOTH
def test_outlier_channels_of_100(host_operators: Path, tmp_path: Path, operators: bool) -> None:
    bundle = export(checkpoint_of(tmp_path / "checkpoint", 256, outliers(100, (206, 223, 236, 249))), tmp_path)
    for tower, batch in (("text", batches("text")[0]), ("image", photos(140))):
        path, counts = fused(bundle / f"{tower}-fp16.onnx", tmp_path, 4, operators=operators)
        assert counts["fused_operators" if operators else "fewer_casts"] >= 2
        hold(bundle, tower, host_operators, path, batch)


@BOTH
def test_swiglu_products_past_65504(host_operators: Path, tmp_path: Path, operators: bool) -> None:
    """Gate and up fit float16, their product does not: it stays float32 until its norm."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 400 if name.endswith(("mlp.w1.weight", "mlp.w2.weight")) else tensor

    bundle = export(checkpoint_of(tmp_path / "checkpoint", 128, change), tmp_path, ("image",))
    model = read(bundle / "image-fp32.onnx")
    sources = [norm.inputs[0] for norm in nodes(model, "LayerNormalization")]
    products = [value.name or "" for value in sources if producer(value, "Mul") is not None and value is not None]
    ranges, _ = channel_ranges(bundle / "image-fp32.onnx", products, [{"pixel_values": photos(140)}])
    assert max(float(r.max()) for r in ranges.values()) > 65504  # or this tests nothing
    path, counts = fused(bundle / "image-fp16.onnx", tmp_path, operators=operators)
    assert counts["fused_operators" if operators else "fewer_casts"] == 5
    hold(bundle, "image", host_operators, path, photos(140))


def test_float32_pixels(small_checkpoint: Path, host_operators: Path, tmp_path: Path) -> None:
    bundle = export(Checkpoint(small_checkpoint), tmp_path, ("image",), pixels="float32")
    path, counts = fused(bundle / "image-fp16.onnx", tmp_path)
    assert counts["fused_operators"] == 3
    batch = ((photos(140).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25).astype(np.float32)
    hold(bundle, "image", host_operators, path, batch)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_older_bundles(precise_bundle: Path, host_operators: Path, tmp_path: Path, tower: str) -> None:
    model = read(precise_bundle / f"{tower}-fp16.onnx")
    with_cudnn(model)
    write(model, tmp_path / "old.onnx")
    path, counts = fused(tmp_path / "old.onnx", tmp_path)
    assert counts["without_cudnn"] > 0 and counts["fused_operators"] == 3
    hold(precise_bundle, tower, host_operators, path, batches(tower)[0])


def test_patch_weights_too_small_for_normalisation(precise_bundle: Path, host_operators: Path, tmp_path: Path) -> None:
    """Divided by 255 they would become subnormal: the picture is then normalised by itself."""
    model = read(precise_bundle / "image-fp16.onnx")
    patches = patch_product(model)
    assert patches is not None
    with Ops(model, before=patches.matmul) as op:
        small = op.const((constant(patches.weight) * np.float16(2**-9)).astype(np.float16))
    patches.matmul.replace_input_with(1, small)
    source = tmp_path / "small.onnx"
    write(model, source)
    path, counts = fused(source, tmp_path)
    assert counts["fused_operators"] == 3
    assert len(nodes(read(path), "MatMul")) == 1
    before, after = run(source, photos(140)), run_fused(path, host_operators, photos(140))
    assert cosines(after["image_embeddings"], before["image_embeddings"]).min() >= LEAST


def test_a_picture_size_that_patches_do_not_divide(
    make_checkpoint: MakeCheckpoint, host_operators: Path, tmp_path: Path
) -> None:
    vision = {"width": 128, "layers": 2, "image_size": 61}
    bundle = export(Checkpoint(make_checkpoint(128, text=SIZES["small"]["text"], vision=vision)), tmp_path, ("image",))
    path, _ = fused(bundle / "image-fp16.onnx", tmp_path)
    batch = photos(61)
    hold(bundle, "image", host_operators, path, batch)
    beyond = batch.copy()
    beyond[:, 56:], beyond[:, :, 56:] = 255, 255
    a, b = (run_fused(path, host_operators, pixels)["image_embeddings"] for pixels in (batch, beyond))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_fewer_casts(precise_bundle: Path, tmp_path: Path, tower: str) -> None:
    """Nodes of a block without the operators: 24 of a picture, 20 of a text, four of them views; the stream and the
    SwiGLU stay float32. Texts are not padded.
    """
    path, counts = fused(precise_bundle / f"{tower}-fp16.onnx", tmp_path, operators=False)
    assert counts["fewer_casts"] == 3 and counts["packed_text"] == (3 if tower == "text" else 0)
    model = read(path)
    order = list(model.graph)
    splits = [node for node in nodes(model, "Split") if len(node.outputs) == 3]
    starts = [order.index(node) for node in splits]
    assert starts[1] - starts[0] == (24 if tower == "image" else 20)
    block = Counter(node.op_type for node in order[starts[0] : starts[1]])
    assert block["MatMul"] == 4 and block["SkipLayerNormalization"] == 2 and block["RotaryEmbedding"] == 2
    assert block["Cast"] == (7 if tower == "image" else 4)
    products = [node for node in nodes(model, "MatMul") if node.inputs[1].producer() is None]  # type: ignore[union-attr]
    for node in products:
        assert constant(node.inputs[1]).dtype == np.float16
    assert len(nodes(model, "MatMul")) - len(products) == (2 if tower == "text" else 0)  # means
    for node in nodes(model, "SkipLayerNormalization", MICROSOFT):
        assert all(constant(value).dtype == np.float32 for value in node.inputs[2:5])


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("keep", ["0", "1", "2", "02"])
def test_fewer_casts_beside_blocks_in_float32(
    precise_bundle: Path, host_operators: Path, tmp_path: Path, tower: str, keep: str
) -> None:
    source = lowered(precise_bundle, tower, tmp_path, [f"blocks.{index}" for index in keep])
    path, counts = fused(source, tmp_path, operators=False)
    assert counts["fewer_casts"] == 3 - len(keep)
    batch = batches(tower)[0]
    before, after = run(source, batch), run_fused(path, host_operators, batch)
    for name, values in after.items():
        assert cosines(values, before[name]).min() >= 0.99999


def test_other_graphs_are_refused(precise_bundle: Path) -> None:
    for tower in ("text", "image"):
        with pytest.raises(PassError, match="no block of the graph is completely float16"):
            for_cuda(read(precise_bundle / f"{tower}-fp32.onnx"), HEADS, operators=True)
        model = read(precise_bundle / f"{tower}-fp16.onnx")
        for_cuda(model, HEADS, operators=True)
        with pytest.raises(PassError):  # not a bundle's graph any more
            for_cuda(model, HEADS, operators=True)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_a_graph_of_another_form_is_refused(precise_bundle: Path, tower: str) -> None:
    """A residual connection, an activation or a norm that is not the tower's."""
    model = read(precise_bundle / f"{tower}-fp16.onnx")
    activation = nodes(model, "Gelu" if tower == "text" else "Sigmoid")[1]
    with Ops(model, before=activation) as op:
        op.replace(activation.outputs[0], op("Tanh", activation.inputs[:1]))
    with pytest.raises(PassError, match="does not match a bundle's fp16 graph"):
        for_cuda(model, HEADS, operators=True)
    model = read(precise_bundle / f"{tower}-fp16.onnx")
    (stream,) = (
        nodes(model, "LayerNormalization")[0].inputs[:1]
        if tower == "image"
        else nodes(model, "LayerNormalization")[0].outputs
    )
    assert stream is not None
    add, index = next((use.node, use.idx) for use in stream.uses() if use.node.op_type == "Add")
    with Ops(model, before=add) as op:
        doubled = op("Mul", [stream, op.const(np.float32(2))])
    add.replace_input_with(index, doubled)
    with pytest.raises(PassError, match="does not match a bundle's fp16 graph"):
        for_cuda(model, HEADS, operators=True)
