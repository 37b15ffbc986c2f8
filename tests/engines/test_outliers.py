"""Checkpoints with extreme weights: lower precisions hold their bounds, or are refused.

Outlier channels: norm gains in text, output rows of attn.proj and w3 in images, in all layers
after the second. What the graphs return is compared with fp32 by `jinaclip certify` on its built-in inputs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jinaclip import ClipModel
from jinaclip.bundle.manifest import Bundle
from jinaclip.cli import main
from jinaclip_engines.graph import nodes, read, shape_of
from jinaclip_engines.precision import block_selection
from jinaclip_engines.precision.activation_ranges import channel_ranges
from jinaclip_export.bundle.manifest import Identity
from jinaclip_export.bundle.writer import export_bundle
from jinaclip_export.checkpoint.random_weights import published_config, write_random_checkpoint
from jinaclip_export.checkpoint.reader import WEIGHTS, Checkpoint
from jinaclip_export.errors import ExportError
from tests.conftest import PHOTOS

Change = Callable[[str, torch.Tensor], torch.Tensor]
Capture = pytest.CaptureFixture[str]
LAYERS = 5  # three after the second


def checkpoint_of(directory: Path, width: int, change: Change) -> Checkpoint:
    """A random checkpoint of LAYERS layers with changed tensors, stored as float32: ×10,000 leaves float16's range."""
    text = {
        "vocab_size": 36864, "hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }  # fmt: skip
    config = published_config(width, text, {"width": width, "layers": LAYERS, "image_size": 140})
    write_random_checkpoint(directory, config)
    tensors = load_file(directory / WEIGHTS)
    save_file({name: change(name, tensor.float()) for name, tensor in tensors.items()}, directory / WEIGHTS)
    return Checkpoint(directory)


def outliers(factor: float, channels: Sequence[int]) -> Change:
    """Norm gains of the text tower, output rows of attn.proj and w3 of the image tower, after the second layer."""
    ends = {"text_model": ("norm1.weight", "norm2.weight"), "vision_model": ("attn.proj.weight", "mlp.w3.weight")}

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        layer = name.replace("layers.", "blocks.").partition("blocks.")[2].partition(".")[0]
        if layer.isdigit() and int(layer) >= 2 and name.endswith(ends[name.partition(".")[0]]):
            tensor = tensor.clone()
            tensor[list(channels)] *= factor
        return tensor

    return change


def certificate(bundle: Path, precision: str) -> dict[str, Any]:
    content = (bundle / f"certificates/{precision}-onnxruntime-cpu.json").read_text("utf-8")
    return json.loads(content)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_outlier_channels_of_100_pass_in_every_precision(tmp_path: Path, capsys: Capture) -> None:
    """At full width. With every block in int8 a photo is at 0.95, so blocks stay in float32, at most half of them."""
    checkpoint = checkpoint_of(tmp_path / "checkpoint", 1024, outliers(100, (800, 850, 900, 950, 1000, 1010)))
    path = tmp_path / "bundle"
    precisions = ("fp32", "fp16", "int8")
    bundle = export_bundle(checkpoint, path, identity=Identity("outliers", None, None), precisions=precisions)
    for tower in ("text", "image"):
        report = bundle.manifest["precisions"][tower]["int8"]
        assert sum(report["outliers"].values()) > 0
        assert len({name.rpartition(".")[0] for name in report["kept"]}) <= (LAYERS + 1) // 2
    assert main(["certify", str(path), "--precision", "fp16,int8"]) == 0, capsys.readouterr().err
    for precision, least in (("fp16", 0.9999), ("int8", 0.995)):
        found = certificate(path, precision)
        assert found["passed"]
        for tower in ("text", "image"):
            assert min(n["cosine"]["min"] for n in found["towers"][tower]["dims"].values()) >= least
    with ClipModel(path) as model:
        assert {t: f["precision"] for t, f in model.info()["towers"].items()} == {"text": "int8", "image": "int8"}


def test_outlier_channels_of_10000_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Where no block is allowed to stay in float32."""
    monkeypatch.setattr(block_selection, "MAX_SHARE", 0.0)
    checkpoint = checkpoint_of(tmp_path / "checkpoint", 128, outliers(10_000, (10, 20)))
    path = tmp_path / "bundle"
    identity = Identity("outliers", None, None)
    with pytest.raises(ExportError, match=r"image int8 .* cannot be exported in int8: remove it from --precision"):
        export_bundle(checkpoint, path, identity=identity, towers=("image",), precisions=("fp32", "int8"))
    export_bundle(checkpoint, path, identity=identity, towers=("text",), precisions=("fp32", "int8"))
    assert main(["certify", str(path), "--precision", "int8"]) == 1
    assert "precision=auto does not use a precision that failed" in capsys.readouterr().err
    found = certificate(path, "int8")["towers"]["text"]
    assert found["verdict"] == "failed" and "expected at least 0.995" in found["reasons"][0]
    with ClipModel(path) as model:
        assert model.info()["towers"]["text"]["precision"] == "fp32"


def test_attention_past_65504_stays_in_float32(tmp_path: Path) -> None:
    """Queries and keys too large for float16: their products, and the attention that reads them, are left alone."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 30_000 if name.endswith("blocks.3.attn.v_proj.weight") else tensor

    checkpoint = checkpoint_of(tmp_path / "checkpoint", 128, change)
    path = tmp_path / "bundle"
    bundle = export_bundle(
        checkpoint, path, identity=Identity("large", None, None), towers=("image",), precisions=("fp32", "fp16")
    )
    assert "blocks.3.v" in bundle.manifest["precisions"]["image"]["fp16"]["kept"]
    assert fp16_cosine(path) >= 0.9999


def test_swiglu_products_past_65504_stay_finite_in_fp16(tmp_path: Path) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 400 if name.endswith(("mlp.w1.weight", "mlp.w2.weight")) else tensor

    checkpoint = checkpoint_of(tmp_path / "checkpoint", 128, change)
    path = tmp_path / "bundle"
    export_bundle(
        checkpoint, path, identity=Identity("swiglu", None, None), towers=("image",), precisions=("fp32", "fp16")
    )
    products = [
        node.outputs[0].name or ""
        for node in nodes(read(path / "image-fp32.onnx"), "Mul")
        if any(user.node.op_type == "LayerNormalization" for user in node.outputs[0].uses())
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (1, 140, 140, 3), np.uint8)
    ranges, _ = channel_ranges(path / "image-fp32.onnx", products, [{"pixel_values": pixels}])
    assert max(float(r.max()) for r in ranges.values()) > 65504  # or this tests nothing
    assert fp16_cosine(path) >= 0.9999


def fp16_cosine(bundle: Path) -> float:
    """Smallest of the photos, with fp32."""
    with ClipModel(bundle, precision="fp32") as fp32, ClipModel(bundle, precision="fp16") as fp16:
        a, b = fp32.encode_image(PHOTOS), fp16.encode_image(PHOTOS)
    return float((a * b).sum(1).min())


# Which blocks stay: the search itself, on losses that are known


def losses(of: dict[str, float]) -> Callable[[Any], float]:
    """A measurement in which each block that does not stay costs what `of` says."""
    return lambda kept: 1 - sum(loss for block, loss in of.items() if block not in kept)


@pytest.mark.parametrize(
    ("of", "kept"),
    [
        ({"a": 0.001, "b": 0.001, "c": 0.0005, "d": 0}, ()),  # near enough as it is
        ({"a": 0.001, "b": 0.02, "c": 0.0, "d": 0.0}, ("b",)),
        ({"a": 0.01, "b": 0.0005, "c": 0.02, "d": 0.0}, ("a", "c")),  # in the tower's order
        ({"a": 0.01, "b": 0.01, "c": 0.02, "d": 0.01}, ("a", "c")),  # no more than half: the best there is
    ],
)
def test_the_fewest_blocks_stay(of: dict[str, float], kept: tuple[str, ...]) -> None:
    selection = block_selection.select_blocks(list(of), losses(of), required=0.997)
    assert selection.blocks == kept
    assert selection.cosine == losses(of)(kept)


def test_blocks_are_found_where_nothing_is_finite_without_them() -> None:
    def measure(kept: Any) -> float:
        return 1.0 if "b" in kept else -1.0

    assert block_selection.select_blocks(["a", "b", "c"], measure, required=0.997).blocks == ("b",)


def test_what_stays_is_in_the_graph_and_the_manifest(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint", 256, outliers(100, (206, 223, 236, 249)))
    path = tmp_path / "bundle"
    export_bundle(
        checkpoint, path, identity=Identity("outliers", None, None), towers=("image",), precisions=("fp32", "int8")
    )
    report = Bundle(path).manifest["precisions"]["image"]["int8"]
    model = read(path / "image-int8.onnx")
    rows = [shape_of(node.inputs[1])[0] for node in nodes(model, "MatMul")]
    assert rows[0] == 3 * 14 * 14  # patches
    kept = sum(count >= 256 for count in rows[1:])  # the others multiply outlier channels
    assert kept == len(report["kept"]) > 0
    assert len(nodes(model, "MatMulInteger")) == 7 * LAYERS - kept
    assert 0.99 < report["cosine"] < 1
    shutil.rmtree(path)
