"""The exported model against public implementations with the same weights, and what the gates let through."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from jinaclip import ClipModel, SelfTestFailed
from jinaclip_export.checkpoint.reader import Checkpoint
from jinaclip_export.errors import ParityError
from jinaclip_export.onnx_export.graphs import MAX_ERROR, TextGraph, _compare
from tests.conftest import PHOTOS, TEXTS
from tests.support import parity
from tests.support.references import unit

# The bound of DESIGN for fp32: sums of a few thousand float32 products in another order.
BOUND = 1e-5


def test_graphs_reproduce_the_publishers_code() -> None:
    for tower, figures in parity.golden_tiny().items():
        assert figures["max_error"] <= BOUND, tower


def test_torch_towers_reproduce_the_publishers_code() -> None:
    io = np.load(parity.GOLDEN / "io.npz")
    checkpoint = Checkpoint(parity.GOLDEN)
    with torch.inference_mode():
        ids, pixels = torch.from_numpy(io["input_ids"]), torch.from_numpy(io["pixel_values"])
        text, image = checkpoint.text_tower(), checkpoint.image_tower()
        found = {
            "text_embeddings": text(ids),
            "image_embeddings": image(pixels),
            "text_embeddings_row1_unpadded": text(ids[1:2, : int((ids[1] != 1).sum())]),
        }
        # Hidden states are compared where they mean something: not at padding.
        keep = (io["input_ids"] != 1)[..., None]
        np.testing.assert_allclose(text.hidden(ids).numpy() * keep, io["text_hidden"] * keep, atol=2e-5)
        normed = image.norm(torch.from_numpy(io["image_hidden"])).numpy()  # theirs is before the final norm
        np.testing.assert_allclose(image.hidden(pixels).numpy(), normed, atol=2e-5)
    for name, value in found.items():
        expected = np.atleast_2d(io[name])
        assert np.abs(unit(value.numpy()) - unit(expected)).max() <= BOUND, name


def test_small_bundle_reproduces_public_implementations(small_checkpoint: Path, small_bundle: Path) -> None:
    for tower, figures in parity.measure(small_checkpoint, small_bundle).items():
        assert figures["max_error"] <= BOUND, tower


@pytest.mark.parametrize("name", ["full-width", "odd"])
def test_other_configurations_reproduce_public_implementations(name: str, tmp_path: Path) -> None:
    for tower, figures in parity.measure(*parity.make(name, tmp_path)).items():
        assert figures["max_error"] <= BOUND, tower


@pytest.mark.slow
def test_full_size_reproduces_public_implementations(tmp_path: Path) -> None:
    for tower, figures in parity.measure(*parity.make("full", tmp_path)).items():
        assert figures["max_error"] <= BOUND, tower


def test_random_checkpoints_are_sensitive(small_checkpoint: Path, model: ClipModel) -> None:
    """Otherwise every bound here is empty: a graph that ignores its input would pass."""
    texts, images = model.encode_text(TEXTS), model.encode_image(PHOTOS)
    for vectors in (texts, images):
        cosines = vectors @ vectors.T
        assert np.abs(cosines[~np.eye(len(vectors), dtype=bool)]).mean() <= 0.5
    sentences = [text for text in TEXTS if len(text.split()) >= 6]
    forward = model.encode_text(sentences)
    backward = model.encode_text([" ".join(reversed(text.split())) for text in sentences])
    assert (forward * backward).sum(1).mean() <= 0.9


# What is taken out of a graph: initialiser -> the value that makes it do nothing.
REMOVALS = {
    "text rotary positions": ("text", {"cos": 1.0, "sin": 0.0}),
    "image rotary positions": ("image", {"cos": 1.0, "sin": 0.0}),
    "position embedding": ("image", {"pos_embed": 0.0}),
    "normalisation": ("image", {"mean": 0.0}),
}


def edit_graph(bundle: Path, tower: str, values: dict[str, float]) -> None:
    """Set whole initialisers of a bundle's graph to a number; sizes and hashes are made right again."""
    path = bundle / f"{tower}-fp32.onnx"
    graph = onnx.load(path)
    found = 0
    for tensor in graph.graph.initializer:
        for name, value in values.items():
            if tensor.name.rsplit(".", 1)[-1] == name:
                array = np.full_like(numpy_helper.to_array(tensor), value)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
                found += 1
    assert found == len(values), [t.name for t in graph.graph.initializer]
    save_graph(bundle, tower, graph)


def save_graph(bundle: Path, tower: str, graph: onnx.ModelProto) -> None:
    path = bundle / f"{tower}-fp32.onnx"
    path.with_suffix(".onnx.data").unlink()
    onnx.save(graph, path, save_as_external_data=True, location=path.name + ".data")
    manifest = json.loads((bundle / "bundle.json").read_text())
    for name in (path.name, path.name + ".data"):
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "bundle.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", REMOVALS)
def test_self_test_refuses_a_graph_without(name: str, small_bundle: Path, tmp_path: Path) -> None:
    tower, values = REMOVALS[name]
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    edit_graph(bundle, tower, values)
    with pytest.raises(SelfTestFailed, match=rf"the error of .* for {tower} golden \d is "):
        ClipModel(bundle, towers=(tower,))


def test_self_test_refuses_a_graph_without_mask(small_bundle: Path, tmp_path: Path) -> None:
    """Padding takes part in attention and mean: seen because the two goldens differ in length."""
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    graph = onnx.load(bundle / "text-fp32.onnx")
    masks = [node for node in graph.graph.node if node.op_type == "Equal"]
    assert len(masks) == 1
    never = numpy_helper.from_array(np.array(-1, np.int64), "never")
    graph.graph.initializer.append(never)
    masks[0].input[1] = "never"
    save_graph(bundle, "text", graph)
    with pytest.raises(SelfTestFailed, match="text golden"):
        ClipModel(bundle, towers=("text",))


def test_export_gate_refuses_what_differs_from_torch(small_checkpoint: Path, small_bundle: Path) -> None:
    """The comparison that ends every export, with one weight changed on torch's side."""
    tower = Checkpoint(small_checkpoint).text_tower()
    ids = np.array([[0, 100, 200, 300, 2]])
    path = small_bundle / "text-fp32.onnx"
    assert _compare(TextGraph(tower), [ids], "input_ids", "text", path) <= MAX_ERROR
    tower.get_parameter("blocks.1.norm2.weight").data[7] *= 1.01
    with pytest.raises(ParityError, match="differs from torch by"):
        _compare(TextGraph(tower), [ids], "input_ids", "text", path)


def test_table_of_the_page_is_the_one_in_the_results() -> None:
    table = parity.render(json.loads(parity.RESULTS.read_text()))
    assert table in (parity.ROOT / "docs/parity.md").read_text("utf-8"), "run `make parity`"
