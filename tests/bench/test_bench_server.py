"""The suite that asks a server, on the small random model. Nothing here depends on how long anything took."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jinaclip import ClipModel
from jinaclip.bundle.manifest import Bundle
from jinaclip.cli import main
from jinaclip_bench.cases.settings import BenchSettings, OpenCase
from jinaclip_bench.cases.table import CASES
from jinaclip_bench.errors import BenchError
from jinaclip_bench.measuring.machine import cpu_seconds
from jinaclip_bench.measuring.timing import Requests, Sample
from jinaclip_bench.reporting.bounds import BOUNDS
from jinaclip_bench.reporting.record import FIELDS, records_of, run_fields
from jinaclip_bench.reporting.report import read_records, render
from jinaclip_bench.run import measure as measure_case
from jinaclip_bench.scenarios.served import _body, _limit_cores, _request_all
from jinaclip_bench.sides.server_process import ServerProcess, serving
from tests.conftest import TEXTS

Records = list[dict[str, Any]]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="by Linux's prctl and /proc")


@pytest.fixture
def server(small_bundle: Path) -> Iterator[ServerProcess]:
    with serving(Bundle(small_bundle), "text", "fp32", threads=1) as started:
        yield started


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# What comes out


def test_the_suite(
    precise_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "results.jsonl"
    command = ["bench", "run", str(precise_bundle), "--suite", "server", "--repeats", "2", "--output", str(output)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == "" and not caplog.messages  # torch has no part in it, and is not missed
    records = read_records(output)
    assert [(record["case"], record["side"]) for record in records] == [
        ("serve-texts", "jinaclip int8 served"),
        ("serve-texts", "ClipModel int8, one a call"),
        ("serve-images", "jinaclip int8 served"),
        ("serve-images", "ClipModel int8, all in a call"),
    ]
    for served, alone in (records[:2], records[2:]):
        case = CASES[served["case"]]
        assert list(served) == list(FIELDS) and served["precision"] == alone["precision"] == "int8"
        assert served["shape"][0] == case.rows and served["provenance"] and alone["provenance"] is None
        assert alone["against"]["jinaclip int8 served"]["cosine"] > 0.999 and alone["served"] is None
        found = served["served"]
        assert sum(int(size) * count for size, count in found["batches"].items()) == 2 * case.rows
        assert 0 < found["request_ms"]["p50"] <= found["request_ms"]["p99"] <= served["max"]
        assert found["clients_cpu_ms"] > 0 and served["versions"]["uvicorn"]
        words = [f"| {bound.case} " for bound in BOUNDS if bound.case == case.name]
        assert len(words) == 1 and words[0] in out.split("\n\n")[-1]
    assert "not measured" not in out and out == render(records) and "server CPU ms per request" in out


def test_texts_come_back_in_their_order(small_bundle: Path) -> None:
    """Many clients and texts of all lengths: what runs together is another mix every time."""
    settings = BenchSettings(Bundle(small_bundle), None, threads=1, repeats=1, suite="server")
    case = replace(CASES["serve-texts"], rows=100, clients=7)
    served, alone = measure_case(case, settings, {}, run_fields(settings.bundle, "server"))
    assert alone["against"]["jinaclip fp32 served"]["cosine"] > 0.999999
    assert served["shape"] == [100, 126] and served["tokens_per_s"] and len(served["served"]["batches"]) > 1


def test_figures_of_known_requests(small_bundle: Path) -> None:
    settings = BenchSettings(Bundle(small_bundle), None, threads=1, repeats=2)
    samples = [
        Sample(1.0, np.zeros(1), requests=Requests([0.1, 0.3], 0.01, 0.5, {1: 2})),
        Sample(1.0, np.zeros(1), requests=Requests([0.3, 0.5], 0.03, 0.7, {2: 1})),
    ]
    opened = OpenCase({}, shape=(2, 3), tokens=6)

    def served(samples: list[Sample]) -> Any:
        facts = run_fields(settings.bundle)
        (record,) = records_of(CASES["serve-texts"], opened, settings, {"jinaclip fp32 served": samples}, {}, facts)
        return record["served"]

    found = served(samples)
    assert found["request_ms"] == {"p50": 300.0, "p99": pytest.approx(494.0)}
    assert found["clients_cpu_ms"] == pytest.approx(10.0) and found["server_cpu_ms"] == pytest.approx(300.0)
    assert found["batches"] == {"1": 2, "2": 1}
    untold = [replace(samples[0], requests=Requests([0.1], 0.01, None, {1: 1})), samples[1]]
    assert served(untold)["server_cpu_ms"] is None


# The server and its clients


def test_vectors_and_runs(server: ServerProcess, model: ClipModel) -> None:
    assert json.loads(_body("cat")) == {"input": "cat", "encoding_format": "base64"}
    sample = _request_all(server, [_body(text) for text in TEXTS], clients=3)
    assert np.abs(sample.output - model.encode_text(TEXTS)).max() <= 1e-6
    assert sample.requests is not None and len(sample.requests.seconds) == len(TEXTS)
    assert sum(size * count for size, count in sample.requests.batches.items()) == len(TEXTS)
    again = _request_all(server, [_body("cat")] * 2, clients=1)
    assert again.requests is not None and again.requests.batches == {1: 2}  # of this sample alone
    assert sum(server.batches().values()) == sum(sample.requests.batches.values()) + 2


def test_an_answer_that_is_no_vector(server: ServerProcess) -> None:
    with pytest.raises(BenchError, match=r"failed with status 1: UnexpectedResponse: .*input is an empty list"):
        _request_all(server, [_body("cat"), _body([])], clients=1)


def test_a_server_that_is_gone(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(
        BenchError, match=r"`jinaclip serve` stopped responding .* last line on stderr: jinaclip: random-small at http"
    ):
        server.batches()
    monkeypatch.setattr(server, "batches", dict)
    with pytest.raises(BenchError, match=r"failed with status 1: ConnectionRefusedError: "):
        _request_all(server, [_body("cat")], clients=1)


def test_a_server_that_does_not_start(small_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    bundle = Bundle(copy)
    (copy / "tokenizer.json").unlink()
    said = r"did not become ready and ended with status 1; last line on stderr: .*tokenizer\.json"
    with pytest.raises(BenchError, match=said), serving(bundle, "text", "fp32", threads=1):
        raise AssertionError


def test_the_environments_settings_are_not_the_servers(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINACLIP_SERVE_API_KEY", "secret")
    monkeypatch.setenv("JINACLIP_SERVE_PORT", "1")
    with serving(Bundle(small_bundle), "text", "fp32", threads=1) as server:
        assert len(_request_all(server, [_body("cat")], clients=1).output) == 1


# No process is left, and all have the same cores


def test_the_server_ends_with_its_block(small_bundle: Path) -> None:
    with serving(Bundle(small_bundle), "text", "fp32", threads=1) as server:
        assert is_there(server.pid)
    assert not is_there(server.pid)
    with pytest.raises(KeyboardInterrupt), serving(Bundle(small_bundle), "text", "fp32", threads=1) as server:
        raise KeyboardInterrupt
    assert not is_there(server.pid)


@on_linux
def test_the_server_ends_with_a_run_that_is_killed() -> None:
    """What stands for the server holds the pipe that is read to its end here."""
    code = (
        "import subprocess, sys; from jinaclip_bench.measuring.child_process import command\n"
        "child = subprocess.Popen(command('http.server', '0', '--bind=127.0.0.1'), stdin=subprocess.PIPE)\n"
        "print('started', flush=True); child.wait()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        assert run.stdout is not None and run.stdout.readline() == b"started\n"
        run.kill()
        run.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    late = [sys.executable, "-P", "-m", "jinaclip_bench.measuring.child_process", str(run.pid), "http.server", "0"]
    assert subprocess.run(late, timeout=60).returncode == 1  # its parent ended before it was tied


@on_linux
def test_all_sides_have_the_same_cores(small_bundle: Path) -> None:
    before = os.sched_getaffinity(0)
    with _limit_cores(1), serving(Bundle(small_bundle), "text", "fp32", threads=1) as server:
        assert os.sched_getaffinity(server.pid) == os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


@on_linux
def test_cpu_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    ticks = os.sysconf("SC_CLK_TCK")
    (tmp_path / "7/stat").write_text(f"7 (a name) with ) S 1 {' 0' * 9} {3 * ticks} {2 * ticks} 0 0\n")
    assert cpu_seconds(7, tmp_path) == 5.0
    assert cpu_seconds(8, tmp_path) is None
    found = cpu_seconds(os.getpid())
    assert found is not None and found > 0


def test_the_clients_import_nothing_heavy() -> None:
    """They share the cores with the server."""
    heavy = "sorted({'numpy', 'jinaclip', 'httpx'} & sys.modules.keys())"
    code = f"import jinaclip_bench.sides.load_clients, sys; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
