"""int8 on a CPU without byte dot products (AVX2 only), emulated by qemu-x86_64: Debian's package qemu-user."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jinaclip import ClipModel
from tests.conftest import PHOTOS, TEXTS

QEMU = shutil.which("qemu-x86_64")
SCRIPT = """
import json, sys
sys.path[:0] = json.loads(sys.argv[2])
from jinaclip import ClipModel
from jinaclip.bundle import Bundle
from jinaclip_engines.prepare import prepare
bundle, texts, photos, prepared = json.loads(sys.argv[1])
if prepared:
    for tower in ("text", "image"):
        prepare(Bundle(bundle), tower, "int8")
with ClipModel(bundle, precision="int8", threads=1) as model:
    print(json.dumps([model.encode_text(texts).tolist(), model.encode_image(photos).tolist()]))
"""


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
