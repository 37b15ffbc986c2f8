"""The graphs that GPU backends are given, run here: the very file that TensorRT or the CUDA provider reads, on a CPU.

References: the bundle's fp16 and fp32 graphs. What a GPU's own kernels round is certified on the GPU (tests/gpu).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from jinaclip.backends.onnxruntime.cpu import OnnxRuntimeSession
from jinaclip.backends.tensorrt.session import FINITE
from jinaclip_engines.errors import PassError
from jinaclip_engines.graph import Ops, array, constant, linears, nodes, patch_product, read, signature, write
from jinaclip_engines.passes.onnxruntime_cuda.pipeline import for_cuda, without_cudnn
from jinaclip_engines.passes.tensorrt import POLICIES, for_tensorrt
from jinaclip_engines.precision.fp16 import to_fp16
from tests.support.cuda_operator_graphs import packed, run_operators

HEADS = 2  # of both small towers
RNG = np.random.default_rng(0)
HALF = onnx.TensorProto.FLOAT16
Rewrite = Callable[[ir.Model], object]
REWRITES: dict[str, Rewrite] = {"cuda": partial(for_cuda, heads=HEADS)}
for _policy in POLICIES:
    REWRITES[f"{_policy}, one operator"] = partial(for_tensorrt, policy=_policy)
    REWRITES[f"{_policy}, spelled out"] = partial(for_tensorrt, policy=_policy, attention_operator=False)


def batches(tower: str) -> list[np.ndarray]:
    """Ids with and without padding, of one token and of many; pictures, one of them noise."""
    if tower == "image":
        noise = RNG.integers(0, 2, (1, 140, 140, 3), np.uint8) * np.uint8(255)
        return [np.concatenate([RNG.integers(0, 256, (2, 140, 140, 3), np.uint8), noise])]
    padded = RNG.integers(4, 36000, (3, 40))
    padded[1, 7:] = 1
    padded[2, 1:] = 1
    return [padded, RNG.integers(4, 36000, (1, 1)), RNG.integers(4, 36000, (2, 600))]


def run(path: Path, batch: np.ndarray) -> dict[str, np.ndarray]:
    if "offsets" in {value.name for value in read(path).graph.inputs}:  # texts without padding
        return run_operators(path, None, packed([row[row != 1] for row in batch]))
    session = OnnxRuntimeSession(path)
    try:
        (source,) = session._session.get_inputs()
        return session.run({source.name: batch.astype(np.int32) if source.type == "tensor(int32)" else batch})
    finally:
        session.close()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found: np.ndarray = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return found


def rewritten(bundle: Path, tower: str, name: str, directory: Path) -> Path:
    model = read(bundle / f"{tower}-fp16.onnx")
    REWRITES[name](model)
    path = directory / "rewritten.onnx"
    write(model, path)
    return path


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("name", REWRITES)
def test_a_rewritten_graph_gives_the_fp16_graphs_vectors(
    precise_bundle: Path, tmp_path: Path, tower: str, name: str
) -> None:
    """As near as fp16 itself is to fp32: other sums, the same roundings. What it costs against fp32 is fp16's bound."""
    path = rewritten(precise_bundle, tower, name, tmp_path)
    for batch in batches(tower):
        exact = run(precise_bundle / f"{tower}-fp32.onnx", batch)
        before = run(precise_bundle / f"{tower}-fp16.onnx", batch)
        after = run(path, batch)
        assert after.pop(FINITE, np.array([True])).all()
        assert after.keys() == before.keys()
        for output, values in after.items():
            assert values.dtype == np.float32 and values.shape == before[output].shape
            assert cosines(values, before[output]).min() >= 0.99999
            assert cosines(values, exact[output]).min() >= 0.99995


@pytest.mark.parametrize("name", REWRITES)
def test_the_published_width_and_picture_size(wide_bundle: Path, tmp_path: Path, name: str) -> None:
    for tower, batch in (("text", batches("text")[0]), ("image", RNG.integers(0, 256, (1, 512, 512, 3), np.uint8))):
        model = read(wide_bundle / f"{tower}-fp16.onnx")
        if name == "cuda":
            for_cuda(model, 16)
        else:
            REWRITES[name](model)
        path = tmp_path / f"{tower}.onnx"
        write(model, path)
        found = run(path, batch)[f"l2norm_{tower}_embeddings"]
        for precision, least in (("fp16", 0.99999), ("fp32", 0.99995)):
            expected = run(wide_bundle / f"{tower}-{precision}.onnx", batch)[f"l2norm_{tower}_embeddings"]
            assert cosines(found, expected).min() >= least


@pytest.mark.parametrize("name", REWRITES)
def test_padding_changes_nothing(precise_bundle: Path, tmp_path: Path, name: str) -> None:
    """A row alone, beside longer rows, and padded far beyond: one vector, within what other sums of float32 make."""
    path = rewritten(precise_bundle, "text", name, tmp_path)
    padded, *_ = batches("text")
    together = run(path, padded)["l2norm_text_embeddings"]
    further = run(path, np.concatenate([padded, np.full((3, 200), 1)], 1))["l2norm_text_embeddings"]
    for row, vector in zip(padded, together, strict=True):
        alone = run(path, row[None, : (row != 1).sum()])["l2norm_text_embeddings"][0]
        assert np.abs(alone - vector).max() <= 1e-6
    assert np.abs(further - together).max() <= 1e-6


def test_rows_that_are_not_finite_are_told(precise_bundle: Path, tmp_path: Path) -> None:
    for tower in ("text", "image"):
        model = read(precise_bundle / f"{tower}-fp16.onnx")
        for_tensorrt(model, "fp16-acc32")
        spoil = next(v for v in model.graph.initializers.values() if (v.name or "").endswith("blocks.2.norm2.weight"))
        values = array(spoil)
        assert values is not None
        spoil.const_value = ir.tensor(np.where(np.arange(len(values)) == 3, np.nan, values).astype(np.float32))
        path = tmp_path / f"{tower}.onnx"
        write(model, path)
        found = run(path, batches(tower)[0])[FINITE]
        assert found.shape == (3,) and found.dtype == np.bool_ and not found.any()


def test_what_tensorrt_is_given(precise_bundle: Path, tmp_path: Path) -> None:
    """int32 ids and uint8 pixels cross the bus; pixels are cast first; no operator is ONNX Runtime's own."""
    for tower, dtype in (("text", onnx.TensorProto.INT32), ("image", onnx.TensorProto.UINT8)):
        graph = onnx.load(rewritten(precise_bundle, tower, "fp16-acc32, one operator", tmp_path)).graph
        (source,) = graph.input
        assert source.type.tensor_type.elem_type == dtype
        readers = {node.op_type for node in graph.node if source.name in node.input}
        assert readers <= {"Cast", "Shape"} and "Cast" in readers
        assert {node.domain for node in graph.node} <= {""}
        assert [output.name for output in graph.output][-1] == FINITE
        weights = {i.name: i.data_type for i in graph.initializer if len(i.dims) == 2}
        producers = {name: node for node in graph.node for name in node.output}
        for node in (node for node in graph.node if node.op_type == "MatMul" and ".attention." not in node.name):
            cast = producers[node.input[1]]  # weights stay float16 in the file, and are cast to float32 in the graph
            assert cast.op_type == "Cast" and weights[cast.input[0]] == HALF


def test_expected_names_every_layer(precise_bundle: Path) -> None:
    for tower, layers in (("text", ("qkv", "out", "fc1", "fc2")), ("image", ("qkv", "out", "gate", "up", "down"))):
        expected = for_tensorrt(read(precise_bundle / f"{tower}-fp16.onnx"), "fp16-acc32")
        assert expected.attention == tuple(f"blocks.{block}.attention" for block in range(3))
        names = tuple(f"blocks.{block}.{layer}" for block in range(3) for layer in layers)
        assert expected.products == (("patch_embed", *names) if tower == "image" else names)
        assert (expected.mask is not None) == (tower == "text") and expected.float32_products == 0


@pytest.mark.parametrize("name", REWRITES)
@pytest.mark.parametrize("tower", ["text", "image"])
def test_blocks_that_the_bundle_keeps_in_float32_stay(
    precise_bundle: Path, tmp_path: Path, tower: str, name: str
) -> None:
    model = read(precise_bundle / f"{tower}-fp32.onnx")
    ranges = {value.name or "": np.ones(1, np.float32) for layer in linears(model) for value in (layer.x, layer.y)}
    to_fp16(model, ranges, ("blocks.1",))
    kept = tmp_path / "kept.onnx"
    write(model, kept)
    model = read(kept)
    done = REWRITES[name](model)
    if name != "cuda":
        assert getattr(done, "attention") == ("blocks.0.attention", "blocks.2.attention")  # noqa: B009
        assert getattr(done, "float32_products") == (4 if tower == "text" else 7)  # noqa: B009
    path = tmp_path / "rewritten.onnx"
    write(model, path)
    for batch in batches(tower):
        before, after = run(kept, batch), run(path, batch)
        assert cosines(after[f"{tower}_embeddings"], before[f"{tower}_embeddings"]).min() >= 0.99999


def test_cuda_attention_takes_lengths_and_no_mask(precise_bundle: Path, tmp_path: Path) -> None:
    """What its flash kernel asks for: float16 [B, T, D] operands, no mask, tokens of each row (opset 24)."""
    for tower in ("text", "image"):
        graph = onnx.load(rewritten(precise_bundle, tower, "cuda", tmp_path))
        producers = {name: node for node in graph.graph.node for name in node.output}
        types = {value.name: value.data_type for value in graph.graph.initializer}
        for node in (node for node in graph.graph.node if node.op_type == "Attention"):
            assert len(node.input) == (7 if tower == "text" else 3)
            assert not any(node.input[3:6])
            *turned, values = (producers[name] for name in node.input[:3])
            assert {producer.op_type for producer in turned} <= {
                "RotaryEmbedding",
                "Slice",
            } and values.op_type == "Split"
            for rotary in (producer for producer in turned if producer.op_type == "RotaryEmbedding"):
                assert {types[name] for name in rotary.input[1:3]} == {HALF}
            heads = {a.name: a.i for a in node.attribute}
            assert heads["q_num_heads"] == heads["kv_num_heads"] == HEADS
        assert graph.opset_import[0].version == (24 if tower == "text" else 23)
        transposed = [node for node in graph.graph.node if node.op_type == "Transpose"]
        assert len(transposed) == (0 if tower == "text" else 2)  # of the picture and its patches


def test_other_graphs_are_refused(precise_bundle: Path) -> None:
    with pytest.raises(PassError, match="no float16 products"):
        for_tensorrt(read(precise_bundle / "text-fp32.onnx"), "fp16-acc32")
    with pytest.raises(PassError, match="expected one of fp16-acc32, fp16-fast"):
        for_tensorrt(read(precise_bundle / "text-fp16.onnx"), "fp8")
    model = read(precise_bundle / "image-fp16.onnx")
    for_tensorrt(model, "fp16-acc32")
    with pytest.raises(PassError):  # not a bundle's graph any more
        for_tensorrt(model, "fp16-acc32")
    assert for_cuda(read(precise_bundle / "text-fp32.onnx"), HEADS)["flash_attention"] == 0


# Of ONNX Runtime 1.31's CUDA kernels, those that ask for cuDNN, or whose operator has none; tried over stand-in
# libraries. ReduceMean and ReduceSumSquare do where the reduced axes are not at an end.
CUDNN = {
    "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "Einsum", "GRU", "GlobalAveragePool", "GlobalMaxPool",
    "InstanceNormalization", "LRN", "LSTM", "MaxPool", "RNN", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare",
}  # fmt: skip


@pytest.mark.parametrize("tower", ["text", "image"])
def test_no_graph_for_cuda_needs_cudnn(precise_bundle: Path, tmp_path: Path, tower: str) -> None:
    exported = [precise_bundle / f"{tower}-{precision}.onnx" for precision in ("fp32", "fp16")]
    for path in (*exported, rewritten(precise_bundle, tower, "cuda", tmp_path)):
        found = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        assert not found & CUDNN


def with_cudnn(model: ir.Model) -> None:
    """As exports before `without_cudnn` wrote it: ReduceL2, and the patches by a Conv."""
    (root,) = nodes(model, "Sqrt")
    total = root.inputs[0].producer()  # type: ignore[union-attr]
    assert total is not None
    squares = total.inputs[0].producer()  # type: ignore[union-attr]
    assert squares is not None
    with Ops(model, before=root) as op:
        op.replace(root.outputs[0], op("ReduceL2", [squares.inputs[0], total.inputs[1]], keepdims=1))
    patches = patch_product(model)
    if patches is None:
        return
    source = patches.x
    while (node := source.producer()) is not None and node.op_type in ("Cast", "Reshape", "Transpose", "Slice"):
        source = node.inputs[0]  # type: ignore[assignment]  # [B, 3, S, S]
    weight, bias = (constant(value) for value in (patches.weight, patches.bias))
    width, side = weight.shape[1], 14
    with Ops(model, before=patches.matmul) as op:
        if patches.cast is not None:
            source = op("Cast", [source], to=HALF)
        kernel = op.const(np.ascontiguousarray(weight.T.reshape(width, 3, side, side)))
        y = op("Conv", [source, kernel, op.const(bias.astype(weight.dtype))], strides=[side, side])
        if patches.cast is not None:
            y = op("Cast", [y], to=onnx.TensorProto.FLOAT)
        y = op("Reshape", [y, op.const(np.array([0, width, -1]))])
        op.replace(patches.y, op("Transpose", [y], perm=[0, 2, 1]))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("tower", ["text", "image"])
def test_older_bundles_are_rid_of_cudnn(precise_bundle: Path, tmp_path: Path, tower: str, precision: str) -> None:
    """In fp16 the patches' bias is now added in float32, as every other is: other roundings of the stream's start."""
    least = 0.999999 if (tower, precision) == ("image", "fp16") else 0.9999996
    model = read(precise_bundle / f"{tower}-{precision}.onnx")
    with_cudnn(model)
    old, new = tmp_path / "old.onnx", tmp_path / "new.onnx"
    write(model, old)
    model = read(old)
    assert "ReduceL2" in {node.op_type for node in model.graph}
    assert len(nodes(model, "Conv")) == (1 if tower == "image" else 0)
    assert without_cudnn(model, HEADS) == (2 if tower == "image" else 1)
    write(model, new)
    assert not {node.op_type for node in model.graph} & CUDNN
    for batch in batches(tower):
        before, after = run(old, batch), run(new, batch)
        for name, values in after.items():
            assert cosines(values, before[name]).min() >= least
    assert for_cuda(read(old), HEADS)["without_cudnn"] == (2 if tower == "image" else 1)


def test_a_picture_size_that_patches_do_not_divide(wide_bundle: Path, tmp_path: Path) -> None:
    """512 pixels are 36 patches of 14; the last 8 are never read, in an older bundle's graph either."""
    model = read(wide_bundle / "image-fp16.onnx")
    with_cudnn(model)
    path = tmp_path / "old.onnx"
    write(model, path)
    for_cuda(model := read(path), 16)
    write(model, tmp_path / "new.onnx")
    batch = RNG.integers(0, 256, (1, 512, 512, 3), np.uint8)
    found = [run(p, batch)["l2norm_image_embeddings"] for p in (path, tmp_path / "new.onnx")]
    assert cosines(*found).min() >= 0.99999


def test_a_signature_is_of_what_is_computed(precise_bundle: Path) -> None:
    """Engines are kept under it: equal for the same rewrite, another whenever a pass does another thing."""
    found = set()
    for name, rewrite in REWRITES.items():
        signatures = set()
        for _ in range(2):
            model = read(precise_bundle / "text-fp16.onnx")
            rewrite(model)
            signatures.add(signature(model))
        assert len(signatures) == 1, name
        found |= signatures
    assert len(found) == len(REWRITES)
    model = read(precise_bundle / "text-fp16.onnx")
    before = signature(model)
    nodes(model, "LayerNormalization")[0].attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
    assert signature(model) != before
