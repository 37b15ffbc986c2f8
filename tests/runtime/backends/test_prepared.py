"""`jinaclip build --backend onnxruntime`: what it makes, when it is used, and when it is left aside and why."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jinaclip.bundle.engines
from jinaclip import ClipModel
from jinaclip.backends.cost import CPU_COST, UNPADDED_CPU_COST, is_tiled, predicted_bytes
from jinaclip.backends.machine import cpu_features
from jinaclip.backends.onnxruntime.prepared_graphs import RECIPE, find_prepared
from jinaclip.bundle.engines import ENGINES, SIDECAR
from jinaclip.bundle.manifest import Bundle
from jinaclip.cli import main
from jinaclip.errors import SelfTestFailed
from jinaclip_engines.onnxruntime.prepare import prepare
from jinaclip_engines.passes.onnxruntime_cpu import TILED_ABOVE
from tests.conftest import PHOTOS, TEXTS
from tests.runtime.bundle.test_bundle import unprivileged

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def built(precise_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with its prepared graphs, made by the real command. Not to be changed."""
    copy = Path(shutil.copytree(precise_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    assert main(["build", str(copy)]) == 0
    return copy


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def text_facts(bundle: Path, precision: str = "int8", **settings: Any) -> dict[str, Any]:
    with ClipModel(bundle, towers=("text",), precision=precision, **settings) as model:
        facts: dict[str, Any] = model.info()["towers"]["text"]
        return facts


def sidecar_of(bundle: Path, graph: str = "text-int8") -> Path:
    (path,) = (bundle / ENGINES).glob(f"{graph}-*/{SIDECAR}")
    return path


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_vectors_are_those_of_the_bundle(precise_bundle: Path, built: Path, precision: str) -> None:
    long = " ".join(TEXTS) * 40  # past TILED_ABOVE tokens
    with ClipModel(precise_bundle, precision=precision) as plain, ClipModel(built, precision=precision) as prepared:
        assert plain.info()["towers"]["text"]["graph"] == "standard"
        for tower in ("text", "image"):
            assert prepared.info()["towers"][tower]["graph"].startswith(f"{tower}-{precision}-onnxruntime-")
        pairs = [(m.encode_text([*TEXTS, long]), m.encode_image(PHOTOS)) for m in (plain, prepared)]
        assert plain.provenance == prepared.provenance
    for a, b in zip(*pairs, strict=True):
        if precision == "fp32":
            assert np.abs(a - b).max() <= 1e-6
        else:  # where float32's last digits differ, a value may round to the next of 255 steps
            assert (a * b).sum(-1).min() >= 0.9995


def test_it_is_made_once(built: Path, capsys: Capture) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in (built / ENGINES).rglob("*"))
    assert main(["build", str(built), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [entry["made"] for entry in json.loads(out)] == [False] * 4 and err == ""
    assert sorted((path, path.stat().st_mtime_ns) for path in (built / ENGINES).rglob("*")) == before
    assert not [path for path in (built / ENGINES).iterdir() if path.name.startswith(".")]


def test_force_makes_it_again(bundle: Path) -> None:
    before = sidecar_of(bundle).stat().st_mtime_ns
    assert main(["build", str(bundle), "--force", "--towers", "text", "--precision", "int8"]) == 0
    assert sidecar_of(bundle).stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("onnxruntime", "1.0.0", "its onnxruntime is '1.0.0', expected"),
        ("graph", "0" * 16, "its graph is '0000000000000000'"),
        ("system", "Plan9 m68k", "its system is 'Plan9 m68k'"),
        ("format_version", 2, "its format_version is 2"),
        ("recipe", RECIPE["cpu"] - 1, f"its recipe is {RECIPE['cpu'] - 1}, expected {RECIPE['cpu']}"),
        ("cpu_features", [*cpu_features(), "zz_new"], "a CPU with ['zz_new'] and without []"),
    ],
)
def test_one_of_another_machine_is_left_aside(bundle: Path, field: str, value: object, part: str) -> None:
    path = sidecar_of(bundle)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {field: value}), "utf-8")
    facts = text_facts(bundle)
    assert facts["graph"] == "standard"
    assert part in facts["graph_reason"] and "run `jinaclip build` on this machine" in facts["graph_reason"]


def cut(directory: Path) -> None:
    data = directory / "graph.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])


def unlink(directory: Path) -> None:
    (directory / "graph.onnx").unlink()


def scribble(directory: Path) -> None:
    (directory / SIDECAR).write_text("{", "utf-8")


@pytest.mark.parametrize("damage", [cut, unlink, scribble])
def test_a_damaged_one_is_left_aside(bundle: Path, damage: Callable[[Path], None]) -> None:
    damage(sidecar_of(bundle).parent)
    facts = text_facts(bundle)
    assert facts["graph"] == "standard" and "is not used" in facts["graph_reason"]


def test_wrong_weights_are_refused(bundle: Path) -> None:
    data = sidecar_of(bundle).parent / "graph.onnx.data"
    content = np.fromfile(data, np.int8)
    data.write_bytes(content[::-1].tobytes())  # the size is right
    with pytest.raises(SelfTestFailed):
        ClipModel(bundle, towers=("text",), precision="int8")


def test_a_read_only_bundle_takes_a_cache(precise_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own may be entered by this user alone
        top, cache = Path(name), tmp_path / "cache"
        top.chmod(0o755)
        copy = Path(shutil.copytree(precise_bundle, top / "bundle"))
        copy.chmod(0o555)
        command = ["build", str(copy), "--towers", "text", "--precision", "int8"]
        with unprivileged():
            assert main(command) == 1
        assert "use --cache DIR if the bundle is read-only" in capsys.readouterr().err
        assert main([*command, "--cache", str(cache)]) == 0
        assert not (copy / ENGINES).exists()
        assert text_facts(copy, cache_dir=cache)["graph"] != "standard"
        assert text_facts(copy)["graph"] == "standard"
        copy.chmod(0o755)


def test_what_lies_in_the_bundle_is_used_beside_a_cache(built: Path, tmp_path: Path) -> None:
    """As in a container, whose bundle was prepared before, and whose notes go elsewhere."""
    assert text_facts(built, cache_dir=tmp_path / "cache")["graph"] != "standard"


def test_long_texts_are_predicted_to_need_no_scores(built: Path) -> None:
    bundle = Bundle(built)
    prepared, _ = find_prepared(bundle, "text", "fp32")
    assert prepared is not None and prepared.cost.tiled_above == TILED_ABOVE
    ids = np.full((1, 8192), 5)
    assert is_tiled(ids, 1, TILED_ABOVE) and not is_tiled(ids[:, :TILED_ABOVE], 1, TILED_ABOVE)
    assert not is_tiled(np.where(np.arange(8192) == 99, 1, ids), 1, TILED_ABOVE)  # "<pad>" in the text
    assert not is_tiled(ids, 1, None)
    tower = bundle.tower("text")
    assert predicted_bytes(1, 8192, tower) - predicted_bytes(1, 8192, tower, tiled=True) == 2 * 2 * 8192**2 * 4


def test_images_have_no_text_length(built: Path) -> None:
    prepared, reason = find_prepared(Bundle(built), "image", "int8")
    assert prepared is not None and prepared.cost.tiled_above is None and prepared.key in reason
    assert prepared.cost == CPU_COST


def test_padding_is_reckoned_with_as_the_graph_computes_it(precise_bundle: Path, built: Path) -> None:
    for path, cost in ((precise_bundle, CPU_COST), (built, UNPADDED_CPU_COST)):
        with ClipModel(path, towers=("text",), precision="int8") as model:
            assert replace(model.text_encoder.session.cost, tiled_above=None) == cost


def test_options(built: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", str(built), "--precision", "fp8"])
    assert caught.value.code == 2 and "expected some of fp32,fp16,int8" in capsys.readouterr().err
    for words, message in (
        (["--precision", "fp16"], "--precision fp16 cannot be prepared for cpu; expected fp32 or int8"),
        (["--precision", "int8", "--device", "cuda"], "--precision int8 cannot be prepared for cuda; expected fp16"),
        (["--policy", "fp16-fast"], "--policy has no effect with --backend onnxruntime"),
        (["--backend", "tensorrt-rtx", "--precision", "int8"], "--precision has no effect with --backend tensorrt-rtx"),
    ):
        assert main(["build", str(built), *words]) == 1
        assert message in capsys.readouterr().err


def test_cpu_features_are_read_from_the_kernel(tmp_path: Path) -> None:
    for line, expected in (
        ("flags\t\t: fpu avx2 sse4_2 avx512_vnni\n", ("avx2", "avx512_vnni")),
        ("Features\t: fp asimd i8mm crc32\n", ("asimd", "i8mm")),
    ):
        path = tmp_path / f"cpuinfo-{expected[0]}"
        path.write_text(f"processor\t: 0\n{line}", "utf-8")
        assert cpu_features(path) == expected
    assert jinaclip.bundle.engines.SIDECAR_VERSION == 1


def test_graphs_over_cuda_operators_need_their_library(precise_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(shutil.copytree(precise_bundle, tmp_path / "bundle"))
    key, _ = prepare(bundle, "text", "fp16", "cuda", operators=True)
    found, _ = find_prepared(bundle, "text", "fp16", "cuda", operators=True)
    assert found is not None and (found.key, found.operators) == (key, True)
    found, reason = find_prepared(bundle, "text", "fp16", "cuda")
    assert found is None and f"{key} is not used: jinaclip's CUDA operators are not available" in reason
    assert "run `jinaclip build --device cuda` on this machine" in reason
    plain, _ = prepare(bundle, "text", "fp16", "cuda")
    found, reason = find_prepared(bundle, "text", "fp16", "cuda")
    assert found is not None and found.key == plain and reason == f"prepared graph {plain}"
