"""The certificate: what it measures, what it refuses, and what precision="auto" makes of it.

The whole command runs on a bundle of every precision; where a test needs a graph that is a little worse, it is the
small bundle's own with its weights rounded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from jinaclip import ClipModel
from jinaclip.backends.onnxruntime.cpu import onnxruntime_facts
from jinaclip.bundle.certificates import BOUNDS, MIN_ITEMS, note_name, verdict_of
from jinaclip.bundle.manifest import Bundle
from jinaclip.cli import main
from jinaclip.embeddings import truncate
from jinaclip_export import certify
from jinaclip_export.certification import captions, known_answers
from jinaclip_export.certification import inputs as certify_inputs
from jinaclip_export.certification import measure as certify_measure
from jinaclip_export.certification import metrics as certify_numbers
from jinaclip_export.checkpoint.random_weights import SIZES
from tests.conftest import PHOTOS, MakeCheckpoint
from tests.runtime.bundle.test_bundle import unprivileged

ROOT = Path(__file__).parents[2]
INT8 = "certificates/int8-onnxruntime-cpu.json"
Change = Callable[[str, np.ndarray], np.ndarray]
Capture = pytest.CaptureFixture[str]


def rounded(bits: int) -> Change:
    """Weights of MatMuls on 2**bits - 1 levels, a scale for every output channel."""

    def change(name: str, weight: np.ndarray) -> np.ndarray:
        if weight.ndim != 2 or "embedding" in name:
            return weight
        scale = np.maximum(np.abs(weight).max(axis=0, keepdims=True), 1e-12) / (2 ** (bits - 1) - 1)
        return np.asarray(np.round(weight / scale) * scale, np.float32)

    return change


def half(name: str, weight: np.ndarray) -> np.ndarray:
    return weight.astype(np.float16).astype(np.float32)


def register(bundle: Path, tower: str, precision: str) -> None:
    """Enter `<tower>-<precision>.onnx`, which lies there, into bundle.json."""
    manifest = json.loads((bundle / "bundle.json").read_text("utf-8"))
    name = f"{tower}-{precision}.onnx"
    manifest["towers"][tower]["graphs"][precision] = name
    for path in bundle.glob(f"{name}*"):
        content = path.read_bytes()
        manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "bundle.json").write_text(json.dumps(manifest), "utf-8")


def add_graph(bundle: Path, tower: str, precision: str, change: Change) -> None:
    """The fp32 graph of a tower with changed weights, as one of another precision."""
    graph = onnx.load(bundle / f"{tower}-fp32.onnx")
    for weight in graph.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype == np.float32:
            weight.CopyFrom(numpy_helper.from_array(change(weight.name, values), weight.name))
    name = f"{tower}-{precision}.onnx"
    (bundle / f"{name}.data").unlink(missing_ok=True)
    onnx.save(graph, bundle / name, save_as_external_data=True, location=f"{name}.data")
    register(bundle, tower, precision)


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the small bundle that a test may change."""
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


@pytest.fixture
def sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hundred texts, with which a certificate passes here; the real number would only take longer."""
    monkeypatch.setitem(MIN_ITEMS, "text", 100)
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(captions.built_in_texts()[:100]), "utf-8")
    return path


@pytest.fixture(scope="module")
def built_in_images() -> certify_inputs.Items:
    return certify_inputs.built_in_images()


@pytest.fixture
def few_images(built_in_images: certify_inputs.Items, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of six built-in images, with which a certificate passes here."""
    monkeypatch.setitem(MIN_ITEMS, "image", 40)
    items = certify_inputs.Items(built_in_images.items[::6], "built-in")
    monkeypatch.setattr(certify, "built_in_images", lambda: items)


@dataclass
class Certified:
    bundle: Path
    out: str
    err: str
    status: int


@pytest.fixture(scope="module")
def certified(precise_bundle: Path, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Certified:
    """A bundle of every precision, certified on the built-in inputs by the real command. Not to be changed."""
    copy = Path(shutil.copytree(precise_bundle, tmp_path_factory.mktemp("certified") / "bundle"))
    command = [
        sys.executable,
        "-m",
        "jinaclip",
        "certify",
        copy,
        "--against",
        small_checkpoint,
        "--json",
        "--threads",
        "1",
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    return Certified(copy, done.stdout, done.stderr, done.returncode)


def certificate(bundle: Path, precision: str = "int8") -> dict[str, Any]:
    content = (bundle / f"certificates/{precision}-onnxruntime-cpu.json").read_text("utf-8")
    return json.loads(content)  # type: ignore[no-any-return]


def chosen(bundle: Path, tower: str = "text", **settings: Any) -> tuple[str, str]:
    """What auto takes, and why."""
    with ClipModel(bundle, towers=(tower,), **settings) as model:
        facts = model.info()["towers"][tower]
        return facts["precision"], facts["precision_reason"]


# The whole command


def test_every_precision_passes_on_the_built_in_inputs(certified: Certified) -> None:
    assert certified.status == 0, certified.err
    for precision in ("fp32", "fp16", "int8"):
        found = certificate(certified.bundle, precision)
        assert found["passed"] and found["precision"] == precision
        assert found["session"] | onnxruntime_facts() == found["session"]
        for tower, count in (("text", 1230), ("image", 246)):
            entry = found["towers"][tower]
            assert (entry["verdict"], entry["reasons"]) == ("passed", [])
            assert (entry["items"], entry["source"]) == (count, "built-in")
            assert entry["graph"] == Bundle(certified.bundle).graph_identity(tower, precision)
            assert set(entry["dims"]) == {"32", "64", "128"}
            assert entry["reference"].startswith("torch" if precision == "fp32" else "fp32 graph")
            for numbers in entry["dims"].values():
                assert 0 <= numbers["cosine"]["min"] <= numbers["cosine"]["p1"] <= numbers["cosine"]["mean"] <= 1.000001
                assert 0 < numbers["error_ratio"]["median"] <= numbers["error_ratio"]["max"] < 1
                assert numbers["error_ratio"]["median"] < 0.1
                assert 0.5 < numbers["top10"]["across"] <= 1 and 0.5 < numbers["top10"]["within"] <= 1


def test_json_alone_is_on_stdout(certified: Certified) -> None:
    assert json.loads(certified.out) == [certificate(certified.bundle, p) for p in ("fp32", "fp16", "int8")]
    lines = certified.err.splitlines()
    assert len([line for line in lines if line.startswith(("fp32 ", "fp16 ", "int8 "))]) == 3 * 2 * (3 + 1)
    assert "error÷nearest" in lines[0] and "in a batch with an outlier" in certified.err


def test_the_format_page_names_every_field(certified: Certified) -> None:
    page = (ROOT / "docs/bundle.md").read_text("utf-8")

    def names(value: object) -> set[str]:
        return set(value) | {n for v in value.values() for n in names(v)} if isinstance(value, dict) else set()

    for name in names(certificate(certified.bundle)) - {"32", "64", "128", "towers", "text", "image"}:
        assert f"`{name}`" in page, name


def test_numbers_are_those_of_the_model(certified: Certified) -> None:
    """The same cosines, from ClipModel's own vectors in batches."""
    texts = captions.built_in_texts()
    with (
        ClipModel(certified.bundle, towers=("text",), precision="fp32") as reference,
        ClipModel(certified.bundle, towers=("text",), precision="int8") as model,
    ):
        whole = [m.encode_text(texts) for m in (reference, model)]
        for dim in model.dims:
            a, b = (truncate(vectors, dim).astype(np.float64) for vectors in whole)
            stated = certificate(certified.bundle)["towers"]["text"]["dims"][str(dim)]
            assert stated["cosine"]["min"] == pytest.approx((a * b).sum(axis=1).min(), abs=1e-6)
            assert stated["max_abs"] == pytest.approx(np.abs(a - b).max(), abs=1e-5)


def test_weights_that_miss_the_bound(bundle: Path, sentences: Path, capsys: Capture) -> None:
    add_graph(bundle, "text", "int8", rounded(5))
    assert main(["certify", str(bundle), "--towers", "text", "--texts", str(sentences)]) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("jinaclip: int8 text: cosine at dim 32 is 0.9") and "at least 0.995" in last
    found = certificate(bundle)
    assert not found["passed"] and found["towers"]["text"]["verdict"] == "failed"
    assert chosen(bundle) == ("fp32", "int8: certificate's verdict is 'failed', expected 'passed'")


def no_rotary(name: str, weight: np.ndarray) -> np.ndarray:
    """A graph without positions: its tables of cosines are 1, of sines 0."""
    if weight.ndim == 2 and np.abs(weight).max() <= 1 and np.allclose(weight[0], weight[0, 0]):
        return np.full_like(weight, weight[0, 0])
    return weight


@pytest.mark.parametrize("change", [rounded(3), no_rotary], ids=["3 bits", "no rotary"])
def test_a_broken_graph_is_refused(change: Change, bundle: Path, sentences: Path, capsys: Capture) -> None:
    """Already by its self-test; the certificate says so, and the others are still measured."""
    add_graph(bundle, "text", "fp16", half)
    add_graph(bundle, "text", "int8", change)
    assert main(["certify", str(bundle), "--towers", "text", "--texts", str(sentences)]) == 1
    assert "jinaclip: int8 text: self-test of text int8" in capsys.readouterr().err
    assert certificate(bundle, "fp16")["passed"]
    entry = certificate(bundle)["towers"]["text"]
    assert entry["verdict"] == "failed" and "dims" not in entry and "the error of" in entry["error"]


def test_a_graph_that_scales_a_batch_by_its_largest_is_found(bundle: Path, few_images: None) -> None:
    """Dynamic quantisation with one scale for all activations: close to fp32 alone, another vector in company."""
    quantize_dynamic(
        bundle / "image-fp32.onnx", bundle / "image-int8.onnx", per_channel=True, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"], use_external_data_format=True,
    )  # fmt: skip
    register(bundle, "image", "int8")
    assert main(["certify", str(bundle), "--towers", "image", "--precision", "int8"]) == 1
    entry = certificate(bundle)["towers"]["image"]
    assert min(numbers["cosine"]["min"] for numbers in entry["dims"].values()) >= 0.995
    assert entry["batch"]["cosine"] < 0.9999
    (reason,) = entry["reasons"]
    assert reason.startswith("cosine in a batch with another item is 0.99")


def test_infinity_is_refused(bundle: Path, sentences: Path, capsys: Capture) -> None:
    """In one token that no golden has."""
    opened = Bundle(bundle)
    tokenizer = opened.open_tokenizer()
    goldens = {i for golden in opened.goldens["text"] for i in golden.input_ids}
    ids = {i for row in tokenizer.encode(sentences.read_text("utf-8").splitlines()) for i in row}
    token = max(ids - goldens)

    def change(name: str, weight: np.ndarray) -> np.ndarray:
        if "word_embedding" in name:
            weight = weight.copy()
            weight[token] = np.inf
        return weight

    add_graph(bundle, "text", "int8", change)
    assert main(["certify", str(bundle), "--towers", "text", "--texts", str(sentences)]) == 1
    assert "int8 text: the model returned NaN or infinity for" in capsys.readouterr().err
    assert certificate(bundle)["towers"]["text"]["verdict"] == "failed"
    add_graph(bundle, "text", "fp32", change)  # the reference itself: nothing can be measured
    assert main(["certify", str(bundle), "--towers", "text", "--texts", str(sentences)]) == 1
    assert "NaN or infinity" in capsys.readouterr().err


def test_few_items_are_indicative(bundle: Path, sentences: Path, tmp_path: Path, capsys: Capture) -> None:
    add_graph(bundle, "text", "int8", rounded(10))
    lines = sentences.read_text("utf-8").splitlines()
    sentences.write_text("\n".join(lines[1:] + lines[1:3]), "utf-8")  # 99 different ones
    (tmp_path / "photos").mkdir()
    for photo in PHOTOS[:3]:
        shutil.copy(photo, tmp_path / "photos")
    shutil.copy(PHOTOS[0], tmp_path / "photos/again.png")
    words = ["--texts", str(sentences), "--images", str(tmp_path / "photos")]
    assert main(["certify", str(bundle), *words]) == 0
    found = certificate(bundle)
    entry = found["towers"]["text"]
    assert not found["passed"] and (entry["items"], entry["verdict"]) == (99, "indicative")
    assert entry["source"].startswith("sha256:")
    assert entry["reasons"] == ["measured on 99 different texts, expected at least 100"]
    entry = certificate(bundle, "fp32")["towers"]["image"]
    assert entry["items"] == 3 and "measured on 3 different images, expected at least 200" in entry["reasons"]
    assert chosen(bundle) == ("fp32", "int8: certificate's verdict is 'indicative', expected 'passed'")
    capsys.readouterr()


def test_fp32_needs_torch_to_pass(
    bundle: Path, sentences: Path, small_checkpoint: Path, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    words = ["certify", str(bundle), "--towers", "text", "--texts", str(sentences), "--threads", "1"]
    assert main(words) == 0
    entry = certificate(bundle, "fp32")["towers"]["text"]
    assert entry["verdict"] == "indicative" and entry["reference"] is None and "--against" in entry["reasons"][0]
    assert entry["batch"]["max_abs"] <= 1e-6
    assert main([*words, "--against", str(small_checkpoint)]) == 0
    assert certificate(bundle, "fp32")["passed"]
    capsys.readouterr()
    other = make_checkpoint(128, text=SIZES["small"]["text"], vision=SIZES["small"]["vision"], seed=1)
    assert main([*words, "--against", str(other)]) == 1
    assert "use the checkpoint that was exported" in capsys.readouterr().err


def test_a_wrong_fp32_graph_is_told_from_torch(
    bundle: Path, sentences: Path, small_checkpoint: Path, capsys: Capture
) -> None:
    """Weights of 17 bits: a self-test lets them through."""
    add_graph(bundle, "text", "fp32", rounded(17))
    words = ["--towers", "text", "--texts", str(sentences), "--against", str(small_checkpoint)]
    assert main(["certify", str(bundle), *words]) == 1
    assert "fp32 text: largest error at dim 32 is" in capsys.readouterr().err


# precision="auto"


def test_auto_takes_what_is_certified(certified: Certified) -> None:
    for tower in ("text", "image"):
        assert chosen(certified.bundle, tower) == ("int8", "the int8 certificate passed")
        assert chosen(certified.bundle, tower, precision="fp32") == ("fp32", "requested")
    ids = set()
    for towers in (("text",), ("image",), ("text", "image")):
        with ClipModel(certified.bundle, towers=towers) as model:
            ids.add(model.provenance)
    assert len(ids) == 1


def test_auto_needs_a_certificate(small_bundle: Path, bundle: Path) -> None:
    assert chosen(small_bundle) == ("fp32", "the bundle has no faster graph")
    add_graph(bundle, "text", "int8", rounded(10))
    assert chosen(bundle) == ("fp32", "int8: no certificate")
    add_graph(bundle, "text", "fp16", half)
    assert chosen(bundle, precision={"text": "fp16"}) == ("fp16", "requested")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"session": {"version": "1.31.0"}}, "certificate is for version '1.31.0', found"),
        ({"session": {"cpu": "Z80"}}, "certificate is for cpu 'Z80', found"),
        ({"session": {"backend": None}}, "certificate is for backend None"),
        ({"format_version": 2}, "certificate has format version 2, expected 1"),
        ({"precision": "fp16"}, "certificate does not follow the format"),
        ({"towers": []}, "certificate does not follow the format"),
        ({"session": 3}, "certificate does not follow the format"),
        ({"towers": {"text": None}}, "certificate does not cover the text tower"),
        ({"towers": {"text": {"graph": "0123456789abcdef"}}}, "certificate is for another graph"),
        ({"towers": {"text": {"verdict": "indicative"}}}, "certificate's verdict is 'indicative'"),
        ({"towers": {"text": {"verdict": ["passed"]}}}, "certificate's verdict is ['passed']"),
    ],
    ids=str,
)
def test_auto_refuses_another_certificate(
    change: dict[str, Any], reason: str, certified: Certified, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so in the log where this tower did pass, elsewhere: vectors and provenance change with it."""
    copy = Path(shutil.copytree(certified.bundle, tmp_path / "bundle"))

    def merged(old: Any, new: Any) -> Any:
        if isinstance(old, dict) and isinstance(new, dict):
            return old | {key: merged(old.get(key), value) for key, value in new.items()}
        return new

    (copy / INT8).write_text(json.dumps(merged(certificate(copy), change)), "utf-8")
    precision, said = chosen(copy)
    assert precision == "fp32" and said.startswith(f"int8: {reason}")
    lapsed = "towers" not in change or "graph" in str(change)  # in all other cases it does not say "passed" of text
    warnings = [record.getMessage() for record in caplog.records if record.name == "jinaclip"]
    assert len(warnings) == lapsed
    assert all("uses fp32, which gives other vectors and another provenance" in w and reason in w for w in warnings)
    (copy / INT8).write_text("[1, 2", "utf-8")
    assert chosen(copy) == ("fp32", "int8: no certificate")


def test_auto_refuses_when_the_graph_changed(certified: Certified, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(certified.bundle, tmp_path / "bundle"))
    assert chosen(copy)[0] == "int8"  # a copy has other times on disk
    add_graph(copy, "text", "int8", rounded(11))
    assert chosen(copy) == (
        "fp32",
        "int8: certificate is for another graph; run `jinaclip certify` after `jinaclip build`",
    )
    assert chosen(copy, "image")[0] == "int8"


def test_identity_is_that_of_the_files(certified: Certified, small_bundle: Path) -> None:
    whole, small = Bundle(certified.bundle), Bundle(small_bundle)
    graphs = [(tower, precision) for tower in ("text", "image") for precision in ("fp32", "fp16", "int8")]
    assert len({whole.graph_identity(*graph) for graph in graphs}) == 6
    assert whole.graph_identity("text", "fp32") == small.graph_identity("text", "fp32")
    assert len(whole.graph_identity("text", "fp32")) == 16


# Where certificates go


def test_one_tower_after_the_other(bundle: Path, sentences: Path, few_images: None) -> None:
    for tower in ("text", "image"):
        add_graph(bundle, tower, "fp16", half)
    words = ["certify", str(bundle), "--precision", "fp16", "--texts", str(sentences)]
    assert main([*words, "--towers", "text"]) == 0
    assert list(certificate(bundle, "fp16")["towers"]) == ["text"]
    assert main(["certify", str(bundle), "--precision", "fp16", "--towers", "image"]) == 0
    found = certificate(bundle, "fp16")
    assert set(found["towers"]) == {"text", "image"} and found["passed"]
    add_graph(bundle, "text", "fp16", rounded(12))  # what was said of the old graph goes
    assert main(["certify", str(bundle), "--precision", "fp16", "--towers", "image"]) == 0
    assert list(certificate(bundle, "fp16")["towers"]) == ["image"]


def test_a_read_only_bundle(bundle: Path, sentences: Path, capsys: Capture) -> None:
    add_graph(bundle, "text", "int8", rounded(10))
    top = bundle.parent
    words = ["certify", str(bundle), "--towers", "text", "--texts", str(sentences), "--json"]
    assert main(words) == 0  # what is imported on the way need not be readable for everyone
    shutil.rmtree(bundle / "certificates")
    shutil.rmtree(bundle / "selftest", ignore_errors=True)
    (top / "cache").mkdir()
    (top / "cache").chmod(0o777)
    for directory in (top, *top.parents):  # pytest's own are closed to others
        if directory == Path(tempfile.gettempdir()):
            break
        directory.chmod(0o755)
    for path in (bundle, *bundle.iterdir()):
        path.chmod(0o555)
    with unprivileged():
        capsys.readouterr()
        assert main(words) == 1
        out, err = capsys.readouterr()
        assert out == "" and "is not writable; choose another directory with --cache DIR" in err
        assert main([*words, "--cache", str(top / "cache")]) == 0
        assert chosen(bundle) == ("fp32", "int8: no certificate")
        assert chosen(bundle, cache_dir=top / "cache") == ("int8", "the int8 certificate passed")
    bundle.chmod(0o755)
    assert not (bundle / "certificates").exists()


def test_certificates_of_the_bundle_count_beside_a_cache(certified: Certified, tmp_path: Path) -> None:
    assert chosen(certified.bundle, cache_dir=tmp_path / "cache")[0] == "int8"


# What is refused before anything runs


def test_wrong_words(bundle: Path, sentences: Path, tmp_path: Path, capsys: Capture) -> None:
    for words, status, message in (
        (["--precision", "int8"], 1, "has no int8 text graph (it has: fp32)"),
        (["--precision", "fp8"], 2, "expected some of fp32,fp16,int8"),
        (["--threads", "0"], 2, "--threads is 0"),
        (["--towers", "image", "--texts", str(sentences)], 2, "--texts is for the text tower, which is not measured"),
        (["--plot", "x.pdf"], 2, "expected a name that ends in .png or .svg"),
        (["--plot", str(tmp_path / "none/x.png")], 1, "the directory does not exist"),
        (["--plot", "x.png"], 2, "fp32 alone has no reference to compare with"),
        (["--against", str(tmp_path / "none")], 1, "is not a directory"),
        (["--texts", str(tmp_path / "none")], 1, "expected a text file"),
        (["--images", str(tmp_path / "none")], 1, "nothing found"),
        (["--cache", str(sentences)], 1, "is not writable"),
    ):
        try:
            found = main(["certify", str(bundle), *words])
        except SystemExit as exit:
            found = exit.code  # type: ignore[assignment]
        out, err = capsys.readouterr()
        assert (found, out) == (status, "") and message in err, words
    (tmp_path / "one.txt").write_text("cat\ncat\n", "utf-8")
    assert main(["certify", str(bundle), "--texts", str(tmp_path / "one.txt")]) == 1
    assert "--texts has 1 different texts, expected at least 2 (a certificate needs 100)" in capsys.readouterr().err
    (tmp_path / "bad.txt").write_bytes(b"cat\n\xff\n")
    assert main(["certify", str(bundle), "--texts", str(tmp_path / "bad.txt")]) == 1
    assert "line 2 is not UTF-8" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "bad" / name).write_bytes(name.encode())
    assert main(["certify", str(bundle), "--towers", "image", "--images", str(tmp_path / "bad")]) == 1
    assert "image 0: " in (err := capsys.readouterr().err) and "a.png" in err
    assert not (bundle / "certificates").exists()


@pytest.mark.parametrize(
    ("library", "words", "extra"),
    [
        ("skimage", [], "certify needs skimage; run: pip install 'jinaclip[certify]'"),
        ("matplotlib.figure", ["--plot", "x.png", "--precision", "fp32,fp16"], "run: pip install 'jinaclip[certify]'"),
        ("torch", ["--against", "x"], "--against needs torch; run: pip install 'jinaclip[export]'"),
    ],
)
def test_a_missing_library_is_named(
    library: str, words: list[str], extra: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    add_graph(bundle, "text", "fp16", half)
    for module in ("plot", "torch_reference"):
        monkeypatch.delitem(sys.modules, f"jinaclip_export.certification.{module}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["certify", str(bundle), *words]) == 1
    assert extra in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_drawn(suffix: str, bundle: Path, sentences: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    add_graph(bundle, "text", "fp16", half)
    path = tmp_path / f"cosines.{suffix}"
    assert main(["certify", str(bundle), "--towers", "text", "--texts", str(sentences), "--plot", str(path)]) == 0
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == "png" else b"fp16 text" in content


# Statistics, each beside its plain formula


def test_statistics_are_the_plain_formulas() -> None:
    rng = np.random.default_rng(0)
    reference, gallery = rng.normal(size=(40, 16)).astype(np.float32), rng.normal(size=(25, 16)).astype(np.float32)
    found = (reference + 0.3 * rng.normal(size=reference.shape)).astype(np.float32)
    noisy = (gallery + 0.3 * rng.normal(size=gallery.shape)).astype(np.float32)
    for dim in (4, 16):
        numbers = certify_numbers.compare(found, reference, dim, across=(noisy, gallery))

        def units(rows: np.ndarray, dim: int = dim) -> list[list[float]]:
            cut = [[float(x) for x in row[:dim]] for row in rows]
            return [[x / sum(y * y for y in row) ** 0.5 for x in row] for row in cut]

        def dot(a: list[float], b: list[float]) -> float:
            return sum(x * y for x, y in zip(a, b, strict=True))

        def nearest(query: list[float], items: list[list[float]], leave: int | None) -> set[int]:
            order = sorted((i for i in range(len(items)) if i != leave), key=lambda i: -dot(query, items[i]))
            return set(order[:10])

        f, r, g, n = units(found), units(reference), units(gallery), units(noisy)
        same = sorted(dot(a, b) for a, b in zip(f, r, strict=True))
        assert numbers["cosine"]["min"] == pytest.approx(same[0], abs=1e-6)
        assert numbers["cosine"]["mean"] == pytest.approx(sum(same) / 40, abs=1e-6)
        assert numbers["cosine"]["p1"] == pytest.approx(same[0] + 0.39 * (same[1] - same[0]), abs=1e-6)
        differences = [[x - y for x, y in zip(a, b, strict=True)] for a, b in zip(f, r, strict=True)]
        assert numbers["max_abs"] == pytest.approx(max(abs(x) for row in differences for x in row), abs=1e-6)
        ratios = []
        for i, difference in enumerate(differences):
            others = [[x - y for x, y in zip(r[i], r[j], strict=True)] for j in range(40) if j != i]
            ratios.append((dot(difference, difference) / min(dot(o, o) for o in others)) ** 0.5)
        ratios.sort()
        assert numbers["error_ratio"]["max"] == pytest.approx(ratios[-1], rel=1e-5)
        assert numbers["error_ratio"]["median"] == pytest.approx((ratios[19] + ratios[20]) / 2, rel=1e-5)
        within = [len(nearest(f[i], f, i) & nearest(r[i], r, i)) / 10 for i in range(40)]
        across = [len(nearest(f[i], n, None) & nearest(r[i], g, None)) / 10 for i in range(40)]
        assert numbers["top10"]["within"] == pytest.approx(sum(within) / 40)
        assert numbers["top10"]["across"] == pytest.approx(sum(across) / 40)


def test_statistics_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    found, reference = (rng.normal(size=(50, 8)).astype(np.float32) for _ in range(2))
    whole = certify_numbers.compare(found, reference, 8, across=(found[:20], reference[:20]))
    monkeypatch.setattr(certify_numbers, "_ROWS", 7)
    pieces = certify_numbers.compare(found, reference, 8, across=(found[:20], reference[:20]))
    assert json.dumps(pieces) == json.dumps(whole)


def test_statistics_of_few_and_of_equal_items() -> None:
    rows = np.eye(3, 4, dtype=np.float32)
    numbers = certify_numbers.compare(rows, rows, 4, across=(rows[:2], rows[:2]))
    assert numbers["cosine"]["min"] == 1 and numbers["max_abs"] == 0 and numbers["error_ratio"]["max"] == 0
    assert numbers["top10"] == {"within": 1, "across": 1}
    dead = certify_numbers.compare(np.zeros_like(rows), rows, 4)  # a graph that returns nothing
    assert dead["cosine"]["min"] == 0 and dead["error_ratio"]["max"] == pytest.approx(0.5**0.5)


# Bounds


@pytest.mark.parametrize("precision", list(BOUNDS))
def test_every_bound_is_held_at_every_dim(precision: str) -> None:
    def entry(**changes: Any) -> dict[str, Any]:
        exact = {"cosine": {"min": 1.0}, "max_abs": 0.0}
        return {
            "items": 1000,
            "reference": "r",
            "dims": {"32": exact, "64": exact},
            "batch": {"max_abs": 0.0, "cosine": 1.0},
        } | changes

    bounds = BOUNDS[precision]
    assert verdict_of(precision, "text", entry()) == ("passed", [])
    worse = {"cosine": {"min": 0.5}, "max_abs": 0.5}
    for dim in ("32", "64"):
        for value in (worse, {"cosine": {"min": float("nan")}, "max_abs": float("nan")}):
            verdict, reasons = verdict_of(precision, "text", entry(dims=entry()["dims"] | {dim: value}))
            assert verdict == "failed" and len(reasons) == 1 and f"dim {dim}" in reasons[0]
    verdict, reasons = verdict_of(precision, "text", entry(batch={"max_abs": 0.5, "cosine": 0.5}))
    assert verdict == "failed" and len(reasons) == 1 and "in a batch with another item" in reasons[0]
    at_bound = {"cosine": {"min": bounds.cosine or 0}, "max_abs": bounds.max_abs or 1}
    batch = {"cosine": bounds.batch_cosine or 0, "max_abs": bounds.batch_max_abs or 1}
    assert verdict_of(precision, "text", entry(dims={"32": at_bound}, batch=batch))[0] == "passed"
    assert verdict_of(precision, "text", entry(items=999))[0] == "indicative"
    assert verdict_of(precision, "text", entry(items=999, batch={"max_abs": 0.5, "cosine": 0.5}))[0] == "failed"
    assert verdict_of(precision, "text", {"error": "no"}) == ("failed", ["no"])


@pytest.mark.parametrize(("tower", "least"), [("text", 1000), ("image", 200)])
def test_a_tower_needs_its_number_of_items(tower: str, least: int) -> None:
    entry = {"items": least, "reference": "r", "batch": {"max_abs": 0.0, "cosine": 1.0}}
    assert verdict_of("int8", tower, entry) == ("passed", [])
    reason = f"measured on {least - 1} different {tower}s, expected at least {least}"
    assert verdict_of("int8", tower, entry | {"items": least - 1}) == ("indicative", [reason])


def test_name_of_the_file() -> None:
    assert note_name("int8", onnxruntime_facts()) == INT8


# Known answers of the published weights


def test_known_answers_accept_vectors_that_have_them() -> None:
    """Made so that they do: sentence i has its cosines with the first two, and a direction of its own."""
    english, arabic = known_answers.WITH_ENGLISH, known_answers.WITH_ARABIC
    vectors = np.zeros((10, 10))
    vectors[0, 0] = 1
    vectors[1, :2] = english[0], (1 - english[0] ** 2) ** 0.5
    for i in range(2, 10):
        a = english[i - 1]
        b = (arabic[i - 2] - a * vectors[1, 0]) / vectors[1, 1]
        vectors[i, [0, 1, i]] = a, b, (1 - a * a - b * b) ** 0.5
    found = known_answers.compare_known_answers(vectors)
    assert found["count"] == 17 and found["max_error"] < 1e-6
    order = [0, 2, 1, *range(3, 10)]
    assert known_answers.compare_known_answers(vectors[order])["max_error"] > 5e-3


def test_known_answers_refuse_a_random_model(
    bundle: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = ["certify", str(bundle), "--towers", "text", "--texts", str(sentences)]
    assert main(words) == 0
    assert "known_answers" not in certificate(bundle, "fp32")["towers"]["text"]
    monkeypatch.setattr(certify_measure, "PUBLISHED_SHA256", Bundle(bundle).model["weights_sha256"])
    assert main(words) == 1
    entry = certificate(bundle, "fp32")["towers"]["text"]
    assert entry["known_answers"]["max_error"] > 0.1 and entry["verdict"] == "failed"
    assert "error of the known answers is" in capsys.readouterr().err
