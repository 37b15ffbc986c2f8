"""The suite of CPU rows: mixes, the fused graph, the long text, several precisions of ours, and the bounds."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jinaclip import ClipModel
from jinaclip.bundle.manifest import Bundle
from jinaclip.cli import main
from jinaclip.preprocessing.image import normalise, preprocess
from jinaclip_bench.cases.inputs import lengths_of, log_normal_lengths, texts_of
from jinaclip_bench.cases.settings import BenchSettings
from jinaclip_bench.cases.table import CASES, SUITES, Case, random_ids
from jinaclip_bench.errors import BenchError
from jinaclip_bench.measuring import cache
from jinaclip_bench.measuring.machine import reset_peak, resident_mib
from jinaclip_bench.reporting.bounds import BOUNDS, Bound, Measured
from jinaclip_bench.reporting.record import run_fields
from jinaclip_bench.reporting.report import read_records, render
from jinaclip_bench.run import measure as measure_case
from jinaclip_bench.scenarios.in_process import KINDS, USES_TORCH
from jinaclip_bench.sides.fused_onnx import FusedSession, fused_graph, write_fused
from jinaclip_bench.sides.torch_cpu import matching_checkpoint, open_torch
from jinaclip_export.checkpoint.reader import Checkpoint
from tests.bench.conftest import logged
from tests.conftest import PHOTOS, TEXTS

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two_precisions(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose "int8" graphs are its fp32 ones again: what is tested is how sides are told apart."""
    bundle = tmp_path_factory.mktemp("two") / "bundle"
    shutil.copytree(small_bundle, bundle)
    manifest = json.loads((bundle / "bundle.json").read_text("utf-8"))
    for tower in manifest["towers"].values():
        tower["graphs"]["int8"] = tower["graphs"]["fp32"]
    (bundle / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    return bundle


@pytest.fixture(scope="module")
def fused(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused graph of the small model."""
    directory = tmp_path_factory.mktemp("fused") / "fused"
    write_fused(Checkpoint(small_checkpoint), directory)
    return directory / "model.onnx"


@pytest.fixture(scope="module")
def measured(two_precisions: Path, small_checkpoint: Path, fused: Path) -> Callable[[Case], Records]:
    """measured(case): its records, of one or two rounds, from two precisions of ours and all others."""
    bundle = Bundle(two_precisions)
    checkpoint = matching_checkpoint(bundle, small_checkpoint)
    settings = BenchSettings(bundle, checkpoint, 1, repeats=2, precisions=("fp32", "int8"), fused=fused, suite="cpu")

    def run(case: Case) -> Records:
        with open_torch(checkpoint, bundle, case.tower, threads=1) as torch:
            torch = torch if case.kind in USES_TORCH else {}
            return measure_case(case, settings, torch, run_fields(bundle, "cpu"))

    return run


OURS = ["jinaclip fp32", "jinaclip int8"]


@pytest.mark.parametrize(
    ("case", "others"),
    [
        (CASES["text-1x32"], ["torch-fp32", "torch-bf16", "fused-onnx"]),
        (CASES["query-dummy-image"], ["fused-onnx"]),
        (replace(CASES["mix-512"], rows=40, tokens=100), ["torch-fp32", "torch-fp32-unsorted", "torch-bf16"]),
        (replace(CASES["text-8192"], tokens=700), []),
        (CASES["process-text"], ["torch-fp32"]),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_sides_of_a_case(case: Case, others: list[str], measured: Callable[[Case], Records]) -> None:
    records = measured(case)
    assert [record["side"] for record in records] == OURS + others
    for record in records:
        assert list(record["against"]) == [side for side in OURS if side != record["side"]]
        for against in record["against"].values():
            assert against["p10"] <= against["p50"] <= against["p90"]
            assert against["cosine"] > (0.98 if record["side"] == "torch-bf16" else 0.99999)
        assert (record["provenance"] is None) == (record["side"] in others)
    assert [record["precision"] for record in records[:2]] == ["fp32", "int8"]
    assert records[0]["provenance"] != records[1]["provenance"]
    columns = [f"time ÷ {side} (p10 … p90)" for side in OURS] + [f"cosine, {side}" for side in OURS]
    title = render(records).split("\n\n")[1].splitlines()[0]
    assert [cell.strip() for cell in title.strip("|").split("|")][-4:] == columns


def test_a_mix_counts_its_tokens(measured: Callable[[Case], Records]) -> None:
    records = measured(replace(CASES["mix-512"], rows=33, tokens=50))
    lengths = log_normal_lengths(33, 30, 0.8, 50)
    for record in records:
        assert record["shape"] == [33, 50] and record["burn_in"] == 1
        assert record["items_per_s"] == pytest.approx(33e3 / record["p50"], rel=1e-3)
        assert record["tokens_per_s"] == pytest.approx(sum(lengths) * 1e3 / record["p50"], rel=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_memory_above_load_is_that_of_the_call(measured: Callable[[Case], Records]) -> None:
    """Scores of the small model's two heads: 2 · T² · 4 bytes are 2 MiB at 512 tokens and 128 MiB at 4096."""
    short, long = (measured(replace(CASES["text-8192"], tokens=tokens))[0] for tokens in (512, 4096))
    assert 0 <= short["above_load_mib"]["p50"] < 100 < long["above_load_mib"]["p50"]
    assert short["above_load_mib"]["p50"] < short["peak_rss_mib"] and short["shape"] == [1, 512]
    assert "MiB added by the call" in render([short])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_what_the_system_does_not_tell_of_memory(tmp_path: Path) -> None:
    resident = resident_mib()
    assert resident is not None and resident > 10
    assert resident_mib(tmp_path) is None
    reset_peak(tmp_path / "none")


# Texts


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.sigma], ids=lambda case: case.name)
def test_lengths_of_a_mix(case: Case, small_bundle: Path) -> None:
    assert case.tokens is not None and case.median is not None and case.sigma is not None
    lengths = lengths_of(case)
    assert len(lengths) == case.rows and lengths == lengths_of(case)
    assert min(lengths) >= 3 and max(lengths) <= case.tokens and lengths != sorted(lengths)
    logs = np.log(log_normal_lengths(4000, case.median, case.sigma, 10**6))
    assert np.median(logs) == pytest.approx(np.log(case.median), abs=0.02)
    assert np.std(logs) == pytest.approx(case.sigma, abs=0.06)
    stated = re.search(r"the longest has (\d+)", case.summary)
    assert max(lengths) == (int(stated[1]) if stated else 208)
    bundle = Bundle(small_bundle)
    texts = texts_of(bundle, bundle.open_tokenizer(), lengths)
    assert [len(row) for row in bundle.open_tokenizer().encode(texts)] == lengths
    long = [text for text, length in zip(texts, lengths, strict=True) if length > 8]  # of short ones some are equal
    assert len(set(long)) == len(long) > case.rows / 2


def test_clipped_lengths() -> None:
    assert sorted(log_normal_lengths(3, 30, 5.0, 100)) == [3, 30, 100]


def test_texts_that_cannot_be_made(small_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(small_bundle)
    with pytest.raises(BenchError, match=r"at most \d+ tokens, but this case has one of \d+; remove the case"):
        texts_of(bundle, bundle.open_tokenizer(), [bundle.max_tokens + 1])
    tokenizer = bundle.open_tokenizer()
    document = json.loads(bundle.tokenizer.read_text("utf-8"))
    document["model"]["vocab"] = [entry for entry in document["model"]["vocab"] if not entry[0].startswith("▁")]
    bundle.tokenizer = tmp_path / "tokenizer.json"
    bundle.tokenizer.write_text(json.dumps(document), "utf-8")
    with pytest.raises(BenchError, match="has no words of one token"):
        texts_of(bundle, tokenizer, [5])


# The fused graph


def test_the_fused_graph_gives_our_vectors(fused: Path, model: ClipModel) -> None:
    bundle = model.bundle
    tokenizer = bundle.open_tokenizer()
    ids = tokenizer.padded(tokenizer.encode(TEXTS))
    pixels = normalise(np.stack([preprocess(photo, bundle.preprocessing) for photo in PHOTOS]), bundle.preprocessing)
    session = FusedSession(fused, threads=1)
    outputs = session.run(ids, pixels)  # as many images as the caller likes: the two batches are free
    assert len(TEXTS) != len(PHOTOS)
    for kind, expected in (("text", model.encode_text(TEXTS)), ("image", model.encode_image(PHOTOS))):
        raw, unit = outputs[f"{kind}_embeddings"], outputs[f"l2norm_{kind}_embeddings"]
        np.testing.assert_allclose(unit, expected, atol=1e-5)
        np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), expected, atol=1e-5)
    np.testing.assert_allclose(session.embed_text(ids), outputs["l2norm_text_embeddings"], atol=1e-6)
    session.close()


def test_the_fused_graph_needs_both_inputs_and_keeps_its_weights_beside_it(fused: Path, small_bundle: Path) -> None:
    session = FusedSession(fused, threads=1)._session
    ids = random_ids(Bundle(small_bundle), 1, 8)
    assert [(i.name, i.type, len(i.shape)) for i in session.get_inputs()] == [
        ("input_ids", "tensor(int64)", 2),
        ("pixel_values", "tensor(float)", 4),
    ]
    with pytest.raises(ValueError, match="pixel_values"):
        session.run(None, {"input_ids": ids})
    assert fused.stat().st_size < 2e6 < (fused.parent / "model.onnx.data").stat().st_size


def test_the_fused_graph_is_made_once_and_said(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = Checkpoint(small_checkpoint)
    path = fused_graph(checkpoint)
    (message,) = logged(caplog)
    assert "creating a fused graph like the publisher's in the cache: 0.0" in message
    assert fused_graph(checkpoint) == path and logged(caplog) == [message]
    (path.parent / "model.onnx.data").unlink()
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=10**6))
    with pytest.raises(BenchError, match=r"has 0.0 GB free, the fused graph like the publisher's needs 0.0\d+ GB"):
        fused_graph(checkpoint)
    assert cache.cache_directory() == tmp_path / "jinaclip"


# The command


def test_query_dummy_image_brings_the_fused_graph(
    two_precisions: Path, small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    output = tmp_path / "results.jsonl"
    command = ["bench", "run", str(two_precisions), "--checkpoint", str(small_checkpoint), "--threads", "1"]
    command += ["--repeats", "1", "--precision", "int8,fp32", "--output", str(output)]
    assert main([*command, "--cases", "text-1x32"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and not logged(caplog) and "fused-onnx" not in out and not (tmp_path / "jinaclip").exists()
    output.unlink()
    assert main([*command, "--cases", "query-dummy-image,text-1x32"]) == 0
    out, err = capsys.readouterr()
    (message,) = logged(caplog)
    assert message.startswith("creating a fused graph") and "\n" not in message and err == ""
    records = read_records(output)
    assert [record["case"] for record in records if record["side"] == "fused-onnx"] == [
        "text-1x32",
        "query-dummy-image",
    ]
    assert [record["side"] for record in records[:2]] == OURS[::-1] and records[0]["suite"] is None
    bounds = out.split("\n\n")[-1]
    assert "| query-dummy-image | fused-onnx ÷ jinaclip fp32 |" in bounds and "not measured" not in bounds


def test_the_suite_runs_the_towers_and_precisions_that_are_there(
    small_bundle: Path, two_precisions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked: list[list[str]] = []
    precisions: list[tuple[str, ...]] = []

    def run_cases(names: list[str], settings: BenchSettings, write: object) -> None:
        asked.append(list(names))
        precisions.append(settings.precisions)

    monkeypatch.setattr("jinaclip_bench.run.run_cases", run_cases)
    assert main(["bench", "run", str(small_bundle), "--suite", "cpu"]) == 0
    assert asked.pop() == list(SUITES["cpu"]) and precisions.pop() == ("fp32",)
    for words, expected in (
        (["--suite", "cpu"], ("fp32", "int8")),
        (["--suite", "cpu", "--precision", "int8"], ("int8",)),
        (["--suite", "server"], ("int8",)),
        (["--suite", "basic"], ("fp32",)),
        (["--cases", "text-1x32"], ("fp32",)),
    ):
        assert main(["bench", "run", str(two_precisions), *words]) == 0
        assert precisions.pop() == expected
    asked.clear()
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle, bundle)
    manifest = json.loads((bundle / "bundle.json").read_text("utf-8"))
    for section in ("towers", "goldens"):
        del manifest[section]["image"]
    (bundle / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    assert main(["bench", "run", str(bundle), "--suite", "cpu"]) == 0
    assert asked.pop() == [name for name in SUITES["cpu"] if name not in ("image-1", "process-image")]


def test_a_precision_that_is_not_there_is_refused_before_anything_runs(
    small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle, bundle)
    manifest = json.loads((bundle / "bundle.json").read_text("utf-8"))
    manifest["towers"]["image"]["graphs"] = {"fp32": manifest["towers"]["image"]["graphs"]["fp32"]}
    (bundle / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    output = tmp_path / "results.jsonl"
    command = ["bench", "run", str(bundle), "--cases", "text-1x32,image-1", "--precision", "fp32,int8"]
    assert main([*command, "--output", str(output)]) == 1
    assert "int8" in capsys.readouterr().err and output.read_text() == ""


def test_help_lists_the_cases_of_each_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "run", "--help"])
    out = capsys.readouterr().out
    for suite, names in SUITES.items():
        found = re.search(rf"^  {suite} +((?:.+\n)+?)(?=\n|  \w)", out.partition("suites:\n")[2], re.MULTILINE)
        assert found is not None and tuple(found[1].replace(",", " ").split()) == names


# Bounds


def record(case: str, side: str, **values: Any) -> dict[str, Any]:
    return {"case": case, "side": side, "p50": 1.0, "against": {}, "above_load_mib": None} | values


def test_a_bound_finds_its_figures_and_judges_the_median() -> None:
    ratio = {"p50": 3.2, "p10": 3.0, "p90": 3.5, "cosine": 0.999}
    memory = {"p50": 2048.0, "p10": 2000.0, "p90": 3000.0}
    records = [
        record("image-1", "jinaclip int8"),
        record("image-1", "torch-fp32", against={"jinaclip fp32": {**ratio, "p50": 1.9}, "jinaclip int8": ratio}),
        record("text-8192", "jinaclip int8", above_load_mib=memory),
    ]
    by_time = Bound("cpu", "image-1", "int8", "torch-fp32", 3.15)
    assert (
        by_time.measured(records) == Measured(ratio, by_time.description)
        and by_time.description == "torch-fp32 ÷ jinaclip int8"
    )
    assert by_time.holds(3.15) and by_time.holds(3.2) and not by_time.holds(3.149)
    by_memory = Bound("cpu", "text-8192", "int8", "above_load_mib", 2048.0)
    assert by_memory.measured(records) == Measured(memory, "jinaclip int8")
    assert by_memory.description == "jinaclip int8, MiB added by the call"
    assert by_memory.holds(2048.0) and not by_memory.holds(2048.1)
    assert replace(by_memory, precision="fp32").measured(records) is None
    assert replace(by_time, precision="fp16").measured(records) is None
    assert replace(by_time, figure="torch-bf16").measured(records) is None


def test_bounds_are_of_cases_in_their_suite() -> None:
    for bound in BOUNDS:
        assert bound.case in SUITES[bound.suite] and CASES[bound.case].kind in KINDS


def test_the_report_ends_with_the_bounds(measured: Callable[[Case], Records]) -> None:
    records = measured(CASES["query-dummy-image"])
    *_, fused = records
    for median, verdict in ((25.0, "holds"), (12.0, "MISSED")):
        fused["against"]["jinaclip fp32"] |= {"p50": median, "p10": 11.0, "p90": 30.0}
        *_, table = render(records).split("\n\n")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        assert rows[0] == ["case", "figure", "bound", "measured (p10 … p90)", "verdict"]
        of_suite = [bound for bound in BOUNDS if bound.suite == "cpu"]
        assert len(rows) == len(of_suite) + 2
        (row,) = (row for row in rows if row[0] == "query-dummy-image")
        figures = f"{median:.1f} (11.0 … 30.0)"
        assert row == ["query-dummy-image", "fused-onnx ÷ jinaclip fp32", "≥ 20.0", figures, verdict]
        assert sum(row[-1] == "not measured" and row[-2] == "" for row in rows) == len(of_suite) - 1
    alone = [{**record, "suite": None} for record in records]  # cases by name: only what they measured
    assert len(render(alone).split("\n\n")[-1].splitlines()) == 3
    other = [{**record, "suite": "basic", "case": "text-1x32"} for record in records]
    assert "verdict" not in render(other)
