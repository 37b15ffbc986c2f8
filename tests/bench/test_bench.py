"""jinaclip_bench on the small random model. Nothing here depends on how long anything took."""

from __future__ import annotations

import getpass
import io
import json
import platform
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jinaclip.bundle.manifest import TOWERS, Bundle
from jinaclip.cli import main
from jinaclip_bench.cases.settings import BenchSettings
from jinaclip_bench.cases.table import CASES, PHOTO_SIZE, SUITES, photo_jpeg, random_ids
from jinaclip_bench.errors import BenchError
from jinaclip_bench.measuring import cache
from jinaclip_bench.measuring.machine import commit, machine_info, memory_of_this_process
from jinaclip_bench.measuring.timing import Sample, agreement, interleave, paired_ratio, summary, timed
from jinaclip_bench.reporting.record import FIELDS, run_fields, to_line
from jinaclip_bench.reporting.report import read_records, render
from jinaclip_bench.scenarios.in_process import KINDS
from jinaclip_bench.scenarios.new_process import process
from jinaclip_bench.sides import random_model
from jinaclip_bench.sides.torch_cpu import matching_checkpoint, open_torch
from tests.bench.conftest import logged

Records = list[dict[str, Any]]
BASIC = SUITES["basic"]
STEADY = [name for name in BASIC if not name.startswith("process-")]
SIDES = ["jinaclip fp32", "torch-fp32", "torch-bf16"]


@pytest.fixture(scope="module")
def run_file(small_bundle: Path, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `bench run` appends to --output: all cases within one process, then those of new processes."""
    path = tmp_path_factory.mktemp("bench") / "results.jsonl"
    command = ["bench", "run", str(small_bundle), "--checkpoint", str(small_checkpoint), "--threads", "1"]
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([*command, "--cases", ",".join(STEADY), "--repeats", "3", "--output", str(path), "--json"]) == 0
        assert printed.getvalue() == path.read_text("utf-8")
        processes = "process-text,process-image"
        assert main([*command, "--cases", processes, "--repeats", "1", "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def records(run_file: Path) -> Records:
    return read_records(run_file)


# What comes out


def test_every_line_has_every_documented_field(run_file: Path, records: Records) -> None:
    for line, record in zip(run_file.read_text("utf-8").splitlines(), records, strict=True):
        assert list(record) == list(FIELDS)
        assert to_line(record) == line


def test_each_case_has_its_sides_in_turn(records: Records) -> None:
    found = [(record["case"], record["side"]) for record in records]
    expected = dict.fromkeys(STEADY, SIDES) | {"image-preprocess": ["jinaclip"]}
    expected |= {"process-text": SIDES[:2], "process-image": SIDES[:2]}
    assert found == [(case, side) for case in BASIC for side in expected[case]]


def test_sides_return_the_same_vectors(records: Records) -> None:
    for record in records:
        if record["side"].startswith("jinaclip"):
            assert record["against"] == {}
        else:
            against = record["against"]["jinaclip fp32"]
            assert against["cosine"] > (0.999999 if record["side"] == "torch-fp32" else 0.99)


def test_figures_follow_from_the_samples(records: Records) -> None:
    ours: dict[str, Any] = {}
    for record in records:
        samples = record["samples"]
        assert len(samples) == record["repeats"] == (1 if record["case"].startswith("process-") else 3)
        assert record["p50"] == pytest.approx(np.median(samples), abs=1e-3)
        assert record["min"] == min(samples) <= record["p90"] <= record["p99"] <= max(samples) == record["max"]
        if record["side"].startswith("jinaclip"):
            ours[record["case"]] = samples
        else:
            pairs = [a / b for a, b in zip(samples, ours[record["case"]], strict=True)]
            assert record["against"]["jinaclip fp32"]["p50"] == pytest.approx(np.median(pairs), rel=1e-2)


def test_rates_shapes_and_precisions(records: Records, small_bundle: Path) -> None:
    by_case = {record["case"]: record for record in records}
    batch = by_case["text-8x128"]
    assert batch["shape"] == [8, 128] and batch["precision"] == "bf16"
    assert batch["items_per_s"] == pytest.approx(8e3 / batch["p50"], rel=1e-3)
    assert batch["tokens_per_s"] == pytest.approx(8 * 128e3 / batch["p50"], rel=1e-3)
    size = Bundle(small_bundle).preprocessing.size
    assert by_case["image-1"]["shape"] == [1, size, size, 3] and by_case["image-1"]["tokens_per_s"] is None
    pixels = by_case["image-preprocess"]
    assert (pixels["shape"], pixels["threads"], pixels["precision"]) == ([1080, 1920, 3], 1, None)
    assert by_case["process-text"]["items_per_s"] is None and batch["threads"] == 1
    for record in records:
        assert record["weights_sha256"] == Bundle(small_bundle).model["weights_sha256"]
        assert record["machine"]["cores"] >= 1 and record["versions"]["torch"] == torch.__version__
        assert record["model"] == "random-small"
        assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["commit"])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_a_process_without_torch_is_the_smaller_one(records: Records) -> None:
    for tower in ("text", "image"):
        ours, theirs = (r for r in records if r["case"] == f"process-{tower}")
        assert 0 < ours["pss_mib"] <= ours["peak_rss_mib"] < theirs["peak_rss_mib"]
    assert all(r["peak_rss_mib"] is None for r in records if r["case"] in STEADY)
    code = "import jinaclip_bench.sides.single_call, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_names_of_host_user_or_paths(run_file: Path, small_bundle: Path) -> None:
    text = run_file.read_text("utf-8")
    words = set(re.findall(r"[\w.-]+", text))
    assert not words & {platform.node(), getpass.getuser()}
    assert not re.search(r'"[^"]*[/\\][^"]*"', text)
    bundle = Bundle(small_bundle)
    bundle.model["id"] = "secret-project"  # what export takes from the name of a checkpoint's directory
    assert "secret" not in json.dumps(run_fields(bundle))


# What is refused, and what is left out


def bench_error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an expected failure."""
    assert main(["bench", "run", *map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_other_weights_are_refused(
    small_bundle: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_checkpoint, other)
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert "expected the checkpoint that the bundle was exported from" in bench_error(
        capsys, small_bundle, "--checkpoint", other
    )


def test_sides_that_differ_are_not_compared(
    small_bundle: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights with another rotary base: every tensor fits, and torch computes something else."""
    other = tmp_path / "other"
    shutil.copytree(small_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["hf_model_config_kwargs"]["rotary_emb_base"] = 50.0
    (other / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out.jsonl"
    arguments = (small_bundle, "--checkpoint", other, "--cases", "text-1x32", "--output", output)
    assert "return different vectors" in bench_error(capsys, *arguments)
    assert output.read_text() == ""


def test_without_a_checkpoint_jinaclip_stands_alone(
    small_bundle: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--cases", "text-query,image-1", "--repeats", "1"]
    assert main(["bench", "run", str(small_bundle), *arguments]) == 0
    out, err = capsys.readouterr()
    assert logged(caplog) == ["torch is not measured, because --checkpoint was not given"] and err == ""
    assert "| text-query" in out and "| image-1" in out and "torch-" not in out and "÷" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "text-1x32,text-9x9"], f"'text-9x9' is not a case; expected one or more of {','.join(CASES)}"),
        (["--suite", "tpu"], "invalid choice: 'tpu'"),
        (["--suite", "cpu", "--cases", "text-1x32"], "not allowed with argument --suite"),
        (["--precision", "fp32,bf16"], "'bf16' is not a precision; expected one or more of fp32,fp16,int8"),
        (["--checkpoint", "x"], "--checkpoint can only be used with BUNDLE"),
        (["x", "--random", "small"], "--random cannot be used with BUNDLE"),
        (["--repeats", "0"], "'0', expected a whole number from 1"),
        (["--threads", "two"], "'two', expected a whole number from 1"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["bench", "run", *arguments])
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_failing_process_is_told_in_one_line(small_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(small_bundle, copy)
    settings = BenchSettings(Bundle(copy), None, threads=1, repeats=1)
    with process(CASES["process-text"], settings, {}) as opened:
        (copy / "tokenizer.json").unlink()
        with pytest.raises(BenchError, match=r"the jinaclip fp32 text process failed with status 1: .* has no token"):
            opened.sides["jinaclip fp32"]()


# The measuring itself


def test_each_case_has_its_kind_and_tower() -> None:
    assert {name for suite in SUITES.values() for name in suite} == set(CASES)
    for name, case in CASES.items():
        assert case.name == name and case.kind in KINDS and case.tower in TOWERS


def test_summary_and_paired_ratio_of_known_numbers() -> None:
    assert summary([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx(
        {"p50": 3.0, "p90": 4.6, "p99": 4.96, "min": 1.0, "max": 5.0}
    )
    # The machine is ten times slower in the last round: that moves both sides, and not the ratio.
    assert paired_ratio([2.0, 3.0, 40.0], [1.0, 1.0, 10.0]) == pytest.approx({"p50": 3.0, "p10": 2.2, "p90": 3.8})
    # Rounds are paired: the ratio of the medians would be 2.0 ÷ 3.0.
    assert paired_ratio([2.0, 1.0, 8.0], [1.0, 3.0, 4.0])["p50"] == 2.0
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])


def test_sides_take_turns() -> None:
    calls: list[str] = []

    def side(name: str) -> Sample:
        calls.append(name)
        return Sample(len(calls), np.zeros(1))

    rounds: list[None] = []
    samples = interleave(
        {name: lambda name=name: side(name) for name in "abc"},  # type: ignore[misc]
        2,
        advance=lambda: rounds.append(None),
    )
    assert "".join(calls) == "abcabc" and len(rounds) == 2
    assert [sample.seconds for sample in samples["b"]] == [2, 5]


def test_timed_returns_what_the_call_returned() -> None:
    sample = timed(lambda: np.arange(3))()
    assert sample.seconds >= 0 and sample.output.tolist() == [0, 1, 2] and sample.pss_mib is None


def test_agreement_takes_the_worst_row() -> None:
    ours = np.eye(3, dtype=np.float32)
    near = ours.copy()
    near[1] = (0.1, 1.0, 0.0)
    cosines = agreement({"jinaclip fp32": ours, "torch-fp32": near})
    assert cosines == {("torch-fp32", "jinaclip fp32"): pytest.approx(1 / np.sqrt(1.01))}
    for wrong in (ours[::-1], np.full((3, 3), np.nan, np.float32), np.zeros((3, 3), np.float32)):
        with pytest.raises(BenchError, match="different vectors"):
            agreement({"jinaclip fp32": ours, "torch-fp32": wrong})
    with pytest.raises(BenchError, match="shape"):
        agreement({"jinaclip fp32": ours, "torch-bf16": ours[:1]})


def test_agreement_is_with_each_of_ours_and_as_close_as_the_coarser_allows() -> None:
    exact = np.array([[1.0, 0.0]])
    coarse = np.array([[0.97, np.sqrt(1 - 0.97**2)]])
    sides = {"jinaclip fp32": exact, "jinaclip int8": coarse, "torch-bf16": exact, "fused-onnx": exact}
    assert agreement(sides) == {
        (side, ours): pytest.approx(1.0 if {side, ours}.isdisjoint({"jinaclip int8"}) else 0.97)
        for side in sides
        for ours in ("jinaclip fp32", "jinaclip int8")
        if side != ours
    }
    with pytest.raises(BenchError, match="fused-onnx and jinaclip fp32 return different vectors"):
        agreement({"jinaclip fp32": exact, "fused-onnx": coarse})


def test_torch_gets_the_threads_and_gives_them_back(small_bundle: Path, small_checkpoint: Path) -> None:
    bundle, before = Bundle(small_bundle), torch.get_num_threads()
    checkpoint = matching_checkpoint(bundle, small_checkpoint)
    with open_torch(checkpoint, bundle, "text", threads=before + 1, sides=["torch-bf16"]) as embedders:
        assert torch.get_num_threads() == before + 1 and list(embedders) == ["torch-bf16"]
        assert embedders["torch-bf16"](np.array([[0, 9, 2]])).dtype == np.float32
    assert torch.get_num_threads() == before and not embedders


def test_inputs_are_the_same_every_time(small_bundle: Path) -> None:
    bundle = Bundle(small_bundle)
    ids = random_ids(bundle, 3, 40)
    assert ids.shape == (3, 40) and (ids == random_ids(bundle, 3, 40)).all()
    assert (ids[:, 0] == bundle.special_ids["bos"]).all() and (ids[:, -1] == bundle.special_ids["eos"]).all()
    assert not np.isin(ids, bundle.special_ids["pad"]).any() and ids.max() < bundle.vocab_size
    width, height = PHOTO_SIZE
    assert 0.1 < len(photo_jpeg()) / (width * height) < 1  # bytes a pixel, as photos of quality 90 have
    assert len({photo_jpeg(number) for number in range(4)}) == 4


# The machine


def test_facts_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{3 << 30}\n")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz \nflags\t\t: fpu avx2 amx_int8\n")
    facts = machine_info(tmp_path, tmp_path)
    assert facts["cpu"] == "Some CPU @ 2 GHz" and facts["instructions"] == ["avx2", "amx_int8"]
    assert facts["memory_gib"] == 3.0
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimddp i8mm\n")
    assert machine_info(tmp_path, tmp_path)["instructions"] == ["asimddp", "i8mm"]


def test_what_the_system_does_not_tell_is_null(tmp_path: Path) -> None:
    assert machine_info(tmp_path, tmp_path)["instructions"] == []
    assert memory_of_this_process(tmp_path) == {"peak_rss_mib": None, "pss_mib": None}
    assert commit(tmp_path) is None


# The report


def test_render_is_stable(records: Records, run_file: Path) -> None:
    text = render(records)
    assert text == render(read_records(run_file)) == render([dict(reversed(record.items())) for record in records])
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 and text.endswith("|\n") and "peak RSS" in tables[1] and "peak RSS" not in tables[0]
    for table in tables:
        assert len({len(line) for line in table.strip().splitlines()}) == 1
    assert render([]) == ""


def test_render_of_known_records(records: Records) -> None:
    ours, theirs = (r for r in records if r["case"] == "text-1x32" and r["side"] != "torch-bf16")
    figures = {"p50": 1234.5, "p90": 12.34, "p99": 1.234, "min": 0.1234, "max": 5, "items_per_s": 7, "tokens_per_s": 8}
    against = {"jinaclip fp32": {"p50": 2.0, "p10": 1.5, "p90": 3.0, "cosine": 0.99999912}}
    theirs = theirs | figures | {"against": against}
    text = render([ours | figures | {"model": None, "commit": "0123456789abcdef0123-dirty"}, theirs])
    facts, table = text.split("\n\n")
    version = ours["versions"]["jinaclip"]
    assert f"jinaclip {version} (0123456789-dirty), onnxruntime" in facts and "; model, weights " in facts
    title, rule, first, second = table.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (title, first, second)]
    assert cells[0][-2:] == ["time ÷ jinaclip fp32 (p10 … p90)", "cosine, jinaclip fp32"] and set(rule) == set("|-: ")
    assert cells[1] == [
        "text-1x32",
        "jinaclip fp32",
        "3",
        "1,234",
        "12.3",
        "1.23",
        "0.12",
        "5.00",
        "7.00",
        "8.00",
        "",
        "",
    ]
    assert cells[2][1] == "torch-fp32" and cells[2][-2:] == ["2.00 (1.50 … 3.00)", "0.999999"]


@pytest.mark.parametrize("line", ["{", "[]", '{"schema": 1}', '{"schema": 99}'])
def test_a_line_that_is_no_measurement_is_named(line: str, run_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(run_file.read_text("utf-8").splitlines()[0] + "\n" + line + "\n", "utf-8")
    with pytest.raises(BenchError, match=r"line 2 is"):
        read_records(path)


# The random model in the cache


def test_a_run_without_bundle_makes_the_random_model_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = "bench run --random small --cases text-1x32 --repeats 1 --threads 1".split()
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    (message,) = logged(caplog)
    assert message.startswith("creating a random small model in the cache: 0.2 GB on disk") and "torch-fp32" in out
    (directory,) = (path for path in (tmp_path / "jinaclip").iterdir() if path.is_dir())
    assert directory.name.startswith("random-small-seed0-jinaclip") and "-torch" in directory.name
    Bundle(directory / "bundle").verify_hashes()
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == "" and logged(caplog) == [message] and "torch-fp32" in out


def test_a_damaged_random_model_is_remade(
    precise_bundle: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def copy_checkpoint(directory: Path, *_: object, **__: object) -> None:
        shutil.copytree(small_checkpoint, directory)

    def copy_bundle(_: object, output: Path, **__: object) -> None:
        shutil.copytree(precise_bundle, output)

    monkeypatch.setattr(random_model, "write_random_checkpoint", copy_checkpoint)
    monkeypatch.setattr(random_model, "export_bundle", copy_bundle)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle, checkpoint = random_model.cached_model("small").get()
    directory = bundle.directory.parent
    assert len(logged(caplog)) == 1 and checkpoint.directory == directory / "checkpoint"

    (directory / "bundle" / "text-fp32.onnx.data").write_bytes(b"cut")
    partial = directory.with_name(f"{directory.name}.partial")  # as a killed run leaves it
    (partial / "bundle").mkdir(parents=True)
    remade, _ = random_model.cached_model("small").get()
    assert len(logged(caplog)) == 2 and not partial.exists()
    remade.verify_hashes()
    random_model.cached_model("small").get()
    assert len(logged(caplog)) == 2


def test_a_model_of_another_exporter_or_other_weights_is_not_reused(
    small_bundle: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_bundle, tmp_path / "bundle")
    shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    entry = random_model.cached_model("small")
    assert entry.read_valid(tmp_path) is None  # as long as nothing says what made it
    (tmp_path / "made-by").write_text(entry.digest)
    assert entry.read_valid(tmp_path) is not None
    (tmp_path / "made-by").write_text("another")
    assert entry.read_valid(tmp_path) is None
    (tmp_path / "made-by").write_text(entry.digest)
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"")
    assert entry.read_valid(tmp_path) is None


def test_a_failed_making_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(random_model, "write_random_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        random_model.cached_model("small").get()
    assert [path.suffix for path in (tmp_path / "jinaclip").iterdir()] == [".lock"]
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=10**7))
    with pytest.raises(BenchError, match=r"has 0.0 GB free, the random full model needs 14 GB"):
        random_model.cached_model("full").get()


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):  # a relative one must be ignored, says the specification
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.cache_directory() == tmp_path / ".cache" / "jinaclip"


def test_phases_of_a_new_process(small_bundle: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "jinaclip_bench.scenarios.opening_phases",
        str(small_bundle),
        "--precision",
        "fp32",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, how = done.stdout.splitlines()
    assert [line[:24].strip() for line in lines][-4:] == [
        "read the tokenizer", "open the graph", "self-test", "first text",
    ]  # fmt: skip
    assert all(float(line[24:].split()[0]) >= 0 for line in lines) and how.startswith("the bundle's graph")
