"""The TensorRT session over stand-ins that check memory, streams and captures: no GPU is needed, and none is proven."""

from __future__ import annotations

import ast
import gc
import inspect
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.shapes import Profile, bucket_for, common_buckets, most_rows
from jinaclip.backends.tensorrt.engine import Plan
from jinaclip.backends.tensorrt.library import load_library, logger_of
from jinaclip.backends.tensorrt.session import TensorRTSession
from jinaclip.backends.tensorrt.worker import GRAPH_TOKENS, MOST_GRAPHS
from jinaclip.errors import BackendError, EngineMismatch, InputError
from jinaclip_engines.tensorrt.profiles import load_profiles
from tests.runtime.backends import fake_tensorrt
from tests.runtime.backends.fake_tensorrt import PAD, SPOILT, WIDTH, Device, install, write_plan

GPU = Gpu(0, "Stand-in", "9.0", 132, 80_000, "13.0")
TEXT = (Profile("short", (1, 1, 4), (16, 32, 64)), Profile("long", (1, 2, 8), (16, 128, 512)))
IMAGE = (Profile("one", (1, 1, 1)), Profile("many", (1, 4, 8)))
STALL_S = 60
CLOSED = "this model is closed; open a new ClipModel"
Open = Callable[..., TensorRTSession]


@pytest.fixture(autouse=True)
def no_stall() -> Iterator[None]:
    """A deadlock ends the test in place of the run."""

    def give_up(*_: object) -> None:
        raise TimeoutError("this test hangs")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(STALL_S)
    yield
    signal.alarm(0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Of the backend tensorrt; a test must leave it without a fault."""
    device, _ = install(monkeypatch, "tensorrt")
    yield device
    assert device.faults == []


@pytest.fixture
def open_session(tmp_path: Path) -> Open:
    """A session of profiles, TEXT if none are named."""

    def opened(profiles: tuple[Profile, ...] = TEXT, backend: str = "tensorrt", **options: Any) -> TensorRTSession:
        plan = Plan("key", write_plan(tmp_path / "plan.engine", profiles), profiles)
        return TensorRTSession(plan, gpu=GPU, library=load_library(backend), pad=PAD, **options)

    return opened


def texts(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    """int64 [rows, tokens] that end in padding of unequal length."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 600, (rows, tokens))
    for row in ids[1:]:
        row[rng.integers(1, tokens + 1) :] = PAD
    return ids


def ask(session: TensorRTSession, batch: np.ndarray) -> None:
    """Run a batch, and compare with what the stand-in makes of each row."""
    name = "input_ids" if batch.ndim == 2 else "pixel_values"
    found = session.run({name: batch})
    assert list(found) == ["vectors"]
    wide = batch.astype(np.int64).reshape(len(batch), -1)
    expected = np.where(wide == PAD, 0, wide).sum(1)
    assert found["vectors"].tolist() == [[value] * WIDTH for value in expected]


def start(work: Callable[[], Any]) -> Future[Any]:
    """In a thread that does not keep a failed test alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def is_closed(session: TensorRTSession) -> bool:
    with pytest.raises(BackendError, match=CLOSED):
        ask(session, texts(1, 16))
    return True


def fails_once() -> Callable[[], bool]:
    calls = count()
    return lambda: next(calls) == 0


# Runs


def test_batches_of_every_size_give_their_own_rows(device: Device, open_session: Open) -> None:
    session = open_session()
    for _ in range(3):
        for rows, tokens in ((1, 5), (1, 16), (3, 20), (4, 64), (5, 64), (8, 512), (21, 300), (1, 512)):
            ask(session, texts(rows, tokens, seed=rows))
    with pytest.raises(InputError, match="a text has 513 tokens, this engine was built for at most 512"):
        ask(session, texts(1, 513))
    with pytest.raises(InputError, match="the engine's input is input_ids, found ids"):
        session.run({"ids": texts(1, 5)})
    with pytest.raises(BackendError, match="key on Stand-in returned NaN or infinity for row 2 of the batch"):
        ask(session, np.array([[0, 5], [0, 6], [SPOILT, 7]]))
    session.close()
    images = open_session(IMAGE)
    for rows in (1, 2, 3, 8, 19):
        ask(images, np.random.default_rng(rows).integers(0, 256, (rows, 4, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"rows of shape \[5, 4, 3\], expected \[4, 4, 3\]"):
        images.run({"pixel_values": np.zeros((1, 5, 4, 3), np.uint8)})
    images.close()
    gc.collect()
    assert device.live() == []


def test_an_empty_batch_has_empty_outputs(device: Device, open_session: Open) -> None:
    session, images = open_session(), open_session(IMAGE)
    for found in (
        session.run({"input_ids": np.zeros((0, 7), np.int64)}),
        images.run({"pixel_values": np.zeros((0, 4, 4, 3), np.uint8)}),
    ):
        assert list(found) == ["vectors"] and found["vectors"].shape == (0, WIDTH)
        assert found["vectors"].dtype == np.float32
    assert device.calls["execute"] == 0


def test_a_run_copies_in_runs_copies_out_and_waits_once(device: Device, open_session: Open) -> None:
    session = open_session()
    ask(session, texts(1, 32))
    device.calls.clear()
    ask(session, texts(1, 30))
    assert device.calls == {"cudaSetDevice": 1, "cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}
    ask(session, texts(8, 512))
    device.calls.clear()
    ask(session, texts(8, 500))  # too large for a graph
    assert device.calls == {"cudaSetDevice": 1, "cudaMemcpyAsync": 3, "execute": 1, "cudaStreamSynchronize": 1}
    session.close()


# CUDA graphs


@pytest.mark.parametrize("name", ["server", "edge"])
def test_a_second_round_over_all_buckets_captures_nothing(device: Device, open_session: Open, name: str) -> None:
    profiles = load_profiles(name)["text"]
    longest = max(profile.tokens[2] for profile in profiles if profile.tokens)
    shapes = {(rows, tokens) for tokens in range(16, longest + 1, 8) for rows in range(1, 65)}
    buckets = {bucket_for(rows, tokens, profiles) for rows, tokens in shapes if rows <= most_rows(tokens, profiles)}
    session = open_session(profiles, workers=1)
    small = 0
    for bucket in buckets:
        assert bucket is not None and bucket.tokens is not None
        ask(session, texts(bucket.rows, bucket.tokens))
        small += bucket.rows * bucket.tokens <= GRAPH_TOKENS
    assert len(buckets) == {"server": 164, "edge": 66}[name]
    assert session.graphs() == small == {"server": 98, "edge": 62}[name] and small <= MOST_GRAPHS
    device.calls.clear()
    for bucket in buckets:
        assert bucket is not None and bucket.tokens is not None
        ask(session, texts(bucket.rows, bucket.tokens, seed=1))
    assert device.calls["cudaStreamBeginCapture"] == device.calls["context"] == device.calls["cudaMalloc"] == 0
    assert (device.calls["cudaGraphLaunch"], device.calls["execute"]) == (small, len(buckets) - small)
    session.close()


def test_graphs_are_held_to_a_number_and_never_replaced(
    device: Device, open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jinaclip.backends.tensorrt.worker.MOST_GRAPHS", 3)
    session = open_session(workers=1)
    for _ in range(3):
        for tokens in (16, 24, 32, 48, 64):
            ask(session, texts(1, tokens))
    assert session.graphs() == device.calls["cudaStreamBeginCapture"] == 3
    session.close()


@pytest.mark.parametrize(
    ("function", "skipped"),  # calls that belong to the run itself, or succeed before the one that fails
    [("cudaStreamBeginCapture", 0), ("cudaStreamEndCapture", 0), ("cudaGraphInstantiate", 0), ("context", 0),
     ("address", 2), ("execute", 1), ("execute", 2), ("cudaMemcpyAsync", 3), ("cudaMemcpyAsync", 4),
     ("cudaMemcpyAsync", 8), ("cudaStreamSynchronize", 2)],
)  # fmt: skip
def test_a_failed_capture_costs_that_bucket_its_graph_and_nothing_else(
    device: Device, open_session: Open, function: str, skipped: int, caplog: pytest.LogCaptureFixture
) -> None:
    session = open_session(workers=1)
    ask(session, texts(1, 16))
    calls = count()
    device.fail[function] = lambda: next(calls) == skipped
    with caplog.at_level(logging.WARNING, "jinaclip"):
        ask(session, texts(2, 32))
        assert session.graphs() == 1
        ask(session, texts(3, 32))
        assert session.graphs() == 2
        device.calls.clear()
        for seed in range(3):
            ask(session, texts(2, 32, seed))
            ask(session, texts(1, 16, seed))
            ask(session, texts(3, 32, seed))
    assert session.graphs() == 2 and device.calls["cudaStreamBeginCapture"] == 0
    (record,) = caplog.records
    assert "CUDA graph capture failed for batches of [2, 32]; they run without a graph: " in record.getMessage()
    session.close()
    gc.collect()
    assert device.live() == []


def test_a_capture_that_fails_inside_is_ended(device: Device, open_session: Open) -> None:
    """The stream can be used again, and the next bucket is captured in it."""
    session = open_session(workers=1)
    calls = count()
    device.fail["execute"] = lambda: next(calls) == 2  # the run, the settling run, the captured one
    ask(session, texts(1, 16))
    assert (device.calls["cudaStreamBeginCapture"], device.calls["cudaStreamEndCapture"], session.graphs()) == (1, 1, 0)
    ask(session, texts(1, 24))
    assert session.graphs() == 1
    session.close()


def test_a_failed_run_is_an_error_and_the_next_one_works(device: Device, open_session: Open) -> None:
    session = open_session(workers=1)
    for function in ("execute", "cudaMemcpyAsync", "cudaSetDevice"):
        device.fail = {function: fails_once()}
        with pytest.raises(BackendError, match=r"failed to run|CUDA on device 0: cuda(MemcpyAsync|SetDevice): "):
            ask(session, texts(8, 512))
        ask(session, texts(8, 512, seed=1))
    session.close()


# Opening and closing


def test_every_failure_at_open_frees_what_was_there(device: Device, open_session: Open) -> None:
    open_session().close()
    made = {name: device.calls[name] for name in ("cudaMalloc", "cudaMallocHost", "context", "address",
                                                  "cudaStreamCreateWithFlags", "cudaStreamSynchronize")}  # fmt: skip
    for function, number in made.items():
        for at in range(number // (2 if function == "cudaStreamSynchronize" else 1)):
            calls = count()
            device.fail = {function: lambda calls=calls, at=at: next(calls) == at}  # type: ignore[misc]
            with pytest.raises(BackendError):
                open_session()
            assert {"device", "pinned", "stream"}.isdisjoint(device.live()), (function, at)
    gc.collect()
    assert device.live() == []


def test_what_is_refused_at_open(device: Device, tmp_path: Path, open_session: Open) -> None:
    plan = write_plan(tmp_path / "plan.engine", TEXT)
    with pytest.raises(EngineMismatch, match="has 2 profiles, its sidecar lists 1; build it again"):
        TensorRTSession(Plan("key", plan, TEXT[:1]), gpu=GPU, library=load_library("tensorrt"))
    plan.write_bytes(b"other")
    with pytest.raises(EngineMismatch, match=r"tensorrt 11.4.0 on Stand-in .* cannot load"):
        TensorRTSession(Plan("key", plan, TEXT), gpu=GPU, library=load_library("tensorrt"))
    gc.collect()
    assert device.live() == []


@pytest.mark.parametrize("seed", range(3))
def test_closing_while_threads_run(device: Device, open_session: Open, seed: int) -> None:
    """Runs end with their own rows or say that the model is closed; nothing is freed under them."""
    device.delay_s = 0.0003
    session = open_session()
    started = threading.Barrier(17)
    done: list[int] = []
    refused: list[int] = []

    def work(number: int) -> None:
        rng = random.Random(100 * seed + number)
        started.wait()
        for _ in range(200):
            try:
                ask(session, texts(rng.randint(1, 12), rng.choice((5, 16, 40, 64, 200, 512)), rng.randrange(1000)))
            except BackendError as error:
                assert str(error) == CLOSED
                refused.append(number)
                return
            done.append(number)

    threads = [start(partial(work, number)) for number in range(16)]
    started.wait()
    while len(done) < 50 + 100 * seed:
        time.sleep(0.001)
    for closer in [start(session.close), start(session.close)]:
        closer.result(STALL_S)
        assert device.faults == [] and {"device", "pinned", "stream", "graph"}.isdisjoint(device.live())
    for thread in threads:
        thread.result(STALL_S)
    assert len(refused) == 16 and is_closed(session)
    gc.collect()
    assert device.live() == []


def test_a_thread_that_waits_for_a_worker_is_told(device: Device, open_session: Open) -> None:
    session = open_session(workers=1)
    loan = session._pool.borrow()
    assert loan.item is not None
    told = []

    def wait() -> None:
        with pytest.raises(BackendError, match=CLOSED):
            ask(session, texts(1, 16))
        told.append(True)

    waiting = [start(wait) for _ in range(3)]
    with pytest.raises(BackendError, match="from within a run of it in the same thread"):
        session.close()  # as a signal handler would, in the middle of a run: it would wait for itself
    assert told == []
    closing = start(session.close)
    for thread in waiting:
        thread.result(STALL_S)
    assert len(told) == 3 and not closing.done() and "device" in device.live()  # the run still has its memory
    loan.item.run(texts(1, 16))
    loan.give_back()
    closing.result(STALL_S)
    gc.collect()
    assert device.live() == []


def test_closing_twice_and_dropping_without_closing(device: Device, open_session: Open) -> None:
    session = open_session()
    ask(session, texts(1, 16))
    session.close()
    session.close()
    assert is_closed(session) and session.graphs() == 0 and session.describe()["workers"] == 2
    session = open_session()
    ask(session, texts(1, 16))
    del session
    gc.collect()
    assert device.live() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_frees_nothing_and_is_told(device: Device, open_session: Open) -> None:
    """Forked while another thread is in the middle of a run, which in the child never ends."""
    session = open_session(workers=1)
    loan = session._pool.borrow()
    assert loan.item is not None
    child = os.fork()
    if child == 0:
        status = 1
        try:
            before = device.calls.copy()
            session.close()
            with pytest.raises(BackendError, match="does not work after a fork"):
                ask(session, texts(1, 16))
            del session
            gc.collect()
            status = int(device.calls != before)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    loan.give_back()
    ask(session, texts(1, 16))
    session.close()


def test_ctrl_c_in_a_run_leaves_the_worker_idle(device: Device, open_session: Open) -> None:
    """What was enqueued has run before the worker is lent again: the next run writes where this one reads."""
    session = open_session(workers=1)

    def interrupted() -> bool:
        device.fail.clear()
        raise KeyboardInterrupt

    for function in ("execute", "cudaStreamBeginCapture"):
        device.fail = {function: interrupted}
        with pytest.raises(KeyboardInterrupt):
            ask(session, texts(1, 16))
        assert all(not stream.pending for stream in device.streams.values())
        ask(session, texts(1, 24))
    session.close()
    gc.collect()
    assert device.live() == []


# TensorRT-RTX


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Device, list[str]]]:
    device, compiled = install(monkeypatch, "tensorrt-rtx")
    yield device, compiled
    assert device.faults == []


def test_tensorrt_rtx_compiles_common_shapes_at_open_and_keeps_them(
    rtx: tuple[Device, list[str]], open_session: Open, tmp_path: Path
) -> None:
    device, compiled = rtx
    cache = tmp_path / "runtime.cache"
    common = [str([bucket.profile, bucket.rows, bucket.tokens]) for bucket in common_buckets(TEXT)]
    session = open_session(backend="tensorrt-rtx", cache=cache)
    assert compiled == common == json.loads(cache.read_text()) and device.calls["cudaStreamBeginCapture"] == 0
    for rows, tokens in ((1, 5), (1, 30), (1, 128), (2, 128)):
        ask(session, texts(rows, tokens))
    assert compiled == common
    ask(session, texts(8, 512))
    assert len(compiled) == len(common) + 1 and json.loads(cache.read_text()) == common
    session.close()
    assert json.loads(cache.read_text()) == compiled and [path.name for path in tmp_path.iterdir()] == [
        "plan.engine", "runtime.cache"
    ]  # fmt: skip
    compiled.clear()
    written = cache.stat().st_mtime_ns
    session = open_session(backend="tensorrt-rtx", cache=cache)
    ask(session, texts(8, 512))
    session.close()
    assert compiled == [] and cache.stat().st_mtime_ns == written
    cache.write_bytes(b"of another GPU")
    open_session(backend="tensorrt-rtx", cache=cache).close()
    assert compiled == common == json.loads(cache.read_text())
    gc.collect()
    assert device.live() == []


def test_a_cache_that_cannot_be_written_or_is_not_wanted(
    rtx: tuple[Device, list[str]], open_session: Open, tmp_path: Path
) -> None:
    _, compiled = rtx
    session = open_session(backend="tensorrt-rtx")
    assert compiled == []
    ask(session, texts(1, 16))
    session.close()
    session = open_session(backend="tensorrt-rtx", cache=tmp_path / "missing/runtime.cache")
    ask(session, texts(1, 16))
    session.close()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.engine"]


def test_a_shape_that_does_not_run_at_open_is_an_error(
    rtx: tuple[Device, list[str]], open_session: Open, tmp_path: Path
) -> None:
    device, _ = rtx
    device.fail["execute"] = fails_once()
    with pytest.raises(BackendError, match="the engine failed to run"):
        open_session(backend="tensorrt-rtx", cache=tmp_path / "runtime.cache")
    gc.collect()
    assert device.live() == []


def test_common_buckets_are_few() -> None:
    server = load_profiles("server")
    found = [(bucket.rows, bucket.tokens) for bucket in common_buckets(server["text"])]
    singles = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert found == [*((1, tokens) for tokens in singles), (64, 128)]
    assert [bucket.rows for bucket in common_buckets(server["image"])] == [1, 16]
    assert [bucket.rows for bucket in common_buckets(IMAGE)] == [1, 4]


# The library


def test_a_process_has_one_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", logger_delay_s=0.01)
    library, together = load_library("tensorrt"), threading.Barrier(16)

    def ask_for_it() -> Any:
        together.wait()
        return logger_of(library)

    threads = [start(ask_for_it) for _ in range(16)]
    assert len({id(thread.result(STALL_S)) for thread in threads}) == 1


def test_the_stand_ins_have_real_names() -> None:
    """Of cuda-bindings as it is installed, and of TensorRT by the list of test_tensorrt_names.py."""
    api = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    for name in vars(Device):
        assert not name.startswith("cuda") or hasattr(api, name), name
    releases = json.loads((Path(__file__).parent / "tensorrt_names.json").read_text("utf-8"))
    kinds = {"FakeContext": "IExecutionContext", "FakeEngine": "ICudaEngine"}
    tree = ast.parse(inspect.getsource(fake_tensorrt))
    names = {
        (kinds[node.name], part.name)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in kinds
        for part in node.body
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")
    }
    assert len(names) >= 11
    for classes in releases.values():
        assert all(name in classes[kind].split() for kind, name in names)
