"""int8 on the CPU here, and on one without byte dot products: AVX2 only, emulated by qemu-x86_64 (qemu-user)."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from jinaclip import ClipModel
from jinaclip.backends.machine import cpu_features
from jinaclip.backends.onnxruntime.library import _PRODUCT_OF_BYTES, sums_bytes_exactly
from jinaclip.bundle.manifest import Bundle
from jinaclip_engines.onnxruntime.prepare import prepare
from tests.conftest import PHOTOS, TEXTS

QEMU = shutil.which("qemu-x86_64")
SCRIPT = """
import json, sys
sys.path[:0] = json.loads(sys.argv[2])
from jinaclip import ClipModel
from jinaclip.bundle.manifest import Bundle
from jinaclip.backends.onnxruntime.library import sums_bytes_exactly
from jinaclip_engines.onnxruntime.prepare import prepare
bundle, texts, photos, prepared = json.loads(sys.argv[1])
if prepared:
    for tower in ("text", "image"):
        prepare(Bundle(bundle), tower, "int8")
with ClipModel(bundle, precision="int8", threads=1) as model:
    assert not sums_bytes_exactly()
    print(json.dumps([model.encode_text(texts).tolist(), model.encode_image(photos).tolist()]))
"""


def test_the_kernel_is_asked_with_the_product_that_is_named() -> None:
    model = onnx.load_from_string(_PRODUCT_OF_BYTES)
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    assert (node.op_type, [*node.input], [*node.output]) == ("MatMulInteger", ["a", "b"], ["y"])
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert kinds == {"a": onnx.TensorProto.UINT8, "b": onnx.TensorProto.INT8, "y": onnx.TensorProto.INT32}


def test_the_fast_kernel_is_used_where_it_is_exact(precise_bundle: Path, tmp_path: Path) -> None:
    """Asked for exact kernels, onnxruntime takes slow ones even where the fast one is exact: 2.5 times slower."""
    if {"avx_vnni", "avx512_vnni"} & set(cpu_features()):
        assert sums_bytes_exactly()
    directory = Path(shutil.copytree(precise_bundle, tmp_path / "bundle"))
    key, _ = prepare(Bundle(directory), "text", "int8")
    graph = onnx.load(directory / "engines" / key / "graph.onnx", load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    found = {kinds[node.input[1]] for node in products}
    assert found == {onnx.TensorProto.INT8 if sums_bytes_exactly() else onnx.TensorProto.UINT8}


@pytest.mark.skipif(QEMU is None or platform.machine() != "x86_64", reason="needs qemu-x86_64 on an x86-64 machine")
@pytest.mark.parametrize("prepared", [False, True], ids=["bundle's graph", "prepared"])
def test_sums_do_not_saturate(precise_bundle: Path, tmp_path: Path, prepared: bool) -> None:
    """There u8 × s8 products are summed in 16 bits unless it is told not to: image goldens off by 0.2, cosine 0.99."""
    bundle = Path(shutil.copytree(precise_bundle, tmp_path / "bundle"))
    texts, photos = TEXTS[:3], [str(photo) for photo in PHOTOS[:2]]
    with ClipModel(bundle, precision="int8") as model:
        expected = model.encode_text(texts), model.encode_image(photos)
    words = [json.dumps([str(bundle), texts, photos, prepared]), json.dumps(sys.path)]
    command = [str(QEMU), "-cpu", "max", os.path.realpath(sys.executable), "-c", SCRIPT, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for found, here in zip(json.loads(done.stdout), expected, strict=True):
        # Integer sums are the same; float32's last digits differ, and a value may round to the next of 255 steps.
        assert (np.array(found) * here).sum(1).min() >= 0.9999
