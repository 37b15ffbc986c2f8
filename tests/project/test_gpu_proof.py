"""The kit for a machine with a GPU and the script that runs there, as far as they go without one."""

from __future__ import annotations

import json
import mmap
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jinaclip import ClipModel
from jinaclip_export.checkpoint.reader import Checkpoint
from tests.gpu.device_code import containers, reduce
from tests.gpu.proof import random_bundle
from tests.gpu.proof.context import read_results, write_result
from tests.gpu.proof.kit import unpack, write_index
from tests.gpu.proof.operators import races_of_ours
from tests.gpu.proof.plan import BUDGET, PASSES
from tests.gpu.proof.table import table
from tests.gpu.proof.topology import save_topology
from tests.support.from_checkout import ROOT


def container(*entries: tuple[int, bytes]) -> bytes:
    """Device code as nvcc stores it: for each capability a cubin that is not compressed."""
    body = b""
    for capability, content in entries:
        header = struct.pack("<HHIQI", 2, 0x101, 64, len(content), 0)
        header = header.ljust(28, b"\0") + struct.pack("<I", capability)
        body += header.ljust(64, b"\0") + content
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def cubin(name: str) -> bytes:
    """An ELF file with one kernel."""
    names = b"\0" + name.encode() + b"\0"
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 2, 0x10, 0, 0, 0)
    start = 64 + len(names)
    sections = [
        struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, 64, len(names), 0, 0, 0, 0),
        struct.pack("<IIQQQQIIQQ", 0, 2, 0, 0, start, len(symbols), 0, 0, 0, 24),
    ]
    header = bytes(40) + struct.pack("<Q", start + len(symbols)) + bytes(10) + struct.pack("<HHH", 64, len(sections), 0)
    content = header.ljust(64, b"\0") + names + symbols + b"".join(sections)
    return content.ljust(-(-len(content) // 8) * 8, b"\0")


def test_device_code_of_one_architecture_stays(tmp_path: Path) -> None:
    used, unused, old = cubin("flash_forward"), cubin("MoeFCGemm"), b"\1" * 64
    library = tmp_path / "library.so"
    before = b"ELF" * 5 + container((80, old), (90, used)) + b"text" + container((90, unused)) + b"end"
    library.write_bytes(before)
    found = reduce(library, 90, "Moe|Grouped")
    assert (found.containers, found.bytes, found.unused_containers) == (1, len(used), 1)
    after = library.read_bytes()
    assert len(after) == len(before) and used in after and old not in after and b"MoeFCGemm" not in after
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert [[entry.capability for entry in entries] for entries in containers(data)] == [[80, 90], [90]]
    with pytest.raises(ValueError, match=r"no device code for compute capability 8\.9"):
        reduce(library, 89, "Moe")


def test_a_bundle_from_its_topology(small_checkpoint: Path, small_bundle: Path, tmp_path: Path) -> None:
    """Weights that are drawn again give a bundle that passes its self-test, against torch."""
    checkpoint = Checkpoint(small_checkpoint)
    topology = tmp_path / "topology"
    topology.mkdir()
    (topology / "config.json").write_text(json.dumps(checkpoint.read_json("config.json")), "utf-8")
    for name, tower in (("text", checkpoint.text_tower), ("image", checkpoint.image_tower)):
        save_topology(small_bundle / f"{name}-fp32.onnx", tower(), topology)
    assert sum(path.stat().st_size for path in topology.iterdir()) < 1 << 20
    random_bundle.make(topology, tmp_path / "made", "cpu")
    with ClipModel(tmp_path / "made" / "bundle", device="cpu", precision="fp32", self_test="always") as model:
        ratios = [tower["self_test"]["ratio"] for tower in model.info()["towers"].values()]
        assert max(ratios) < 1e-5
        full = model.encode_text("two dogs")
    with ClipModel(tmp_path / "made" / "bundle", device="cpu", precision="fp16", towers=("text",)) as model:
        assert float(full @ model.encode_text("two dogs")) > 0.9999
    assert np.isfinite(full).all()


def test_a_damaged_kit_is_refused(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "libjinaclip_cuda.so").write_bytes(b"code")
    write_index(kit, {"python": "3.12"})
    target = tmp_path / "target"
    target.mkdir()
    assert unpack(kit, target)["python"] == "3.12" and (target / "libjinaclip_cuda.so").read_bytes() == b"code"
    (kit / "libjinaclip_cuda.so").write_bytes(b"cope")
    with pytest.raises(ValueError, match="missing or damaged"):
        unpack(kit, target)


def test_every_part_names_a_function() -> None:
    for name, parts in PASSES.items():
        assert sum(part.least for part in parts if not part.beside) < BUDGET[name]
        for part in parts:
            module, _, function = part.run.partition(":")
            source = (ROOT / "tests" / "gpu" / "proof" / f"{module}.py").read_text("utf-8")
            assert f"def {function}(context: Context) -> None:" in source
            assert set(part.after) <= {other.name for other in parts if other.beside}


def test_results_of_a_killed_part_are_read(tmp_path: Path) -> None:
    write_result(tmp_path, {"part": "fast", "name": "part", "state": "ok", "seconds": 1.0})
    write_result(tmp_path, {"part": "fast", "name": "a side", "ms": 2.0, "p10": 1.0, "p90": 3.0, "images_s": 500.0})
    write_result(tmp_path, {"part": "fast", "name": "other ready", "error": "it failed"})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"part": "fast", "na')
    results = read_results(tmp_path)
    assert len(results) == 3
    text = table(results)
    assert "500.0 images" in text and "it failed" in text and len(text) < 12000


def test_a_pass_goes_on_after_parts_that_fail(tmp_path: Path) -> None:
    """Without a kit and a GPU every part fails quickly, and the report says so."""
    command = [
        sys.executable,
        "-m",
        "tests.gpu.proof",
        "first",
        "--kit",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    command += ["--work", str(tmp_path / "work"), "--device", "cpu", "--dry-run", "--parts", "right,fast-text-1"]
    done = subprocess.run([*command, "--budget", "300"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    states = {line["part"]: line["state"] for line in read_results(tmp_path / "out") if line["name"] == "part"}
    assert states == {"unpack": "failed", "right": "failed", "fast-text-1": "failed"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.jsonl", "log.txt", "files.tar.gz"}


def test_races_of_our_kernels_are_told_from_those_of_cublas() -> None:
    """Lines of racecheck on an H200, shortened."""
    log = """\
========= Warning: Race reported between Read access at void jinaclip::<unnamed>::short_attention_kernel<(int)4>+0x2840
=========     and Write access at void jinaclip::<unnamed>::short_attention_kernel<(int)4>+0x9e70 [248 hazards]
========= Error: Race reported between Read access at nvjet_sm90_hsh_32x64_64x16_4x1_v_bz_splitK_bias_NNN+0xb30
=========     and Write access at nvjet_sm90_hsh_32x64_64x16_4x1_v_bz_splitK_bias_NNN+0x2fc0 [384 hazards]
"""
    (race,) = races_of_ours(log)
    assert race.startswith("Warning: Race reported") and "short_attention_kernel" in race
