"""Whose threads a model runs on: its own, or one pool of the process, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jinaclip import BackendError, ClipModel, InputError, share_threads

HOST = """
import sys
import onnxruntime
import jinaclip
from jinaclip import BackendError, ClipModel

def tasks():
    import os
    return len(os.listdir("/proc/self/task"))

bundle = sys.argv[1]
"""


def host(script: str, bundle: Path) -> str:
    """What a program prints to stdout; nothing may go to stderr."""
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", HOST + script, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_two_towers_share_the_threads(small_bundle: Path) -> None:
    script = """
if shared:
    jinaclip.share_threads(4)
    jinaclip.share_threads(4)
before = tasks()
with ClipModel(bundle, threads=4 if not shared else None) as model:
    vector = model.encode_text("cat")
    print(tasks() - before, [t["threads"] for t in model.info()["towers"].values()], float(vector[0]))
"""
    own = host("shared = False\n" + script, small_bundle)
    shared = host("shared = True\n" + script, small_bundle)
    extra, vector = own.partition(" ")[0], own.rpartition(" ")[2]
    assert int(extra) == 2 * 3 and own.split(" ", 1)[1].startswith("[4, 4]")  # the caller is the fourth of each
    assert int(shared.partition(" ")[0]) <= 3 and shared.split(" ", 1)[1].startswith("[4, 4]")
    assert float(shared.rpartition(" ")[2]) == pytest.approx(float(vector), abs=1e-6)


def test_a_host_with_one_pool_for_all_its_sessions(small_bundle: Path) -> None:
    """onnxruntime then opens no session with threads of its own, and would print to stdout that it tries again."""
    script = """
onnxruntime.set_global_thread_pool_sizes(2, 1)
with ClipModel(bundle) as model:
    print(model.encode_text("cat").shape)
try:
    ClipModel(bundle, threads=3)
except BackendError as error:
    print(error)
"""
    shape, refusal = host(script, small_bundle).splitlines()
    assert shape == "(128,)"
    assert "threads is 3, but all" in refusal and "the host's size" in refusal


def test_a_pool_is_shared_before_anything_is_opened(small_bundle: Path) -> None:
    script = """
ClipModel(bundle, towers=("text",)).close()
try:
    jinaclip.share_threads()
except BackendError as error:
    print(error)
"""
    assert "call share_threads once, before the first ClipModel" in host(script, small_bundle)
    script = """
jinaclip.share_threads(2)
for call in (lambda: jinaclip.share_threads(3), lambda: ClipModel(bundle, threads=3)):
    try:
        call()
    except BackendError as error:
        print(error)
"""
    again, other = host(script, small_bundle).splitlines()
    assert "shares 2 threads already" in again and "share one pool of 2 threads" in other


def test_a_number_of_threads_is_a_whole_number(model: ClipModel) -> None:
    for wrong in (0, -1, 2.0, True, "2"):
        with pytest.raises(InputError, match="whole number from 1"):
            share_threads(wrong)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="has opened models already"):
        share_threads(1)


def test_a_run_that_fails_prints_nothing(small_bundle: Path) -> None:
    """onnxruntime's own second try, with another provider, is off: what was asked for is given or refused."""
    script = """
from pathlib import Path
from jinaclip.backends.onnxruntime.cpu import OnnxRuntimeSession
path = Path(bundle) / "text-fp32.onnx"
try:
    OnnxRuntimeSession(path).run({"input_ids": __import__("numpy").zeros((1, 3), "float32")})
except BackendError as error:
    print(type(error).__name__)
"""
    assert host(script, small_bundle) == "BackendError\n"
