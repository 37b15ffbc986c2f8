"""ONNX Runtime's sessions on a GPU: placement, captures, copies, waits, threads and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jinaclip.backends.cuda import staging
from jinaclip.backends.cuda.gpu import gpu
from jinaclip.backends.onnxruntime import cuda as onnxruntime_cuda
from jinaclip.backends.onnxruntime import cuda_operators
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCuda
from jinaclip.backends.onnxruntime.cuda import (
    MOST_LARGE_GRAPHS,
    MOST_SMALL_GRAPHS,
    RUNS_AT_ONCE,
    OnnxRuntimeCudaSession,
)
from jinaclip.backends.onnxruntime.cuda_placement import host_operators
from jinaclip.backends.onnxruntime.cuda_provider import PROVIDER
from jinaclip.backends.onnxruntime.cuda_runs import GRAPH_IMAGES, GRAPH_TOKENS, Run
from jinaclip.backends.shapes import LADDER, SHORTEST
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError, InputError
from tests.gpu.dry_run.conftest import KINDS, Open
from tests.gpu.dry_run.journal import Journal, Record, launches_per_block

DOCS = Path(__file__).resolve().parents[3] / "docs/gpu.md"
TOWERS = ("text", "image")
PREPARED = ("prepared", "operators")
OUTPUTS = 2  # of each graph: embeddings as they are and of length 1
NOT_THERE_YET = 0xFBFBFBFB  # what pinned memory holds until the copy to it has run
MakeBatch = Callable[..., dict[str, np.ndarray]]
# A shape that is padded for the sake of a graph, and one that is not.
SMALL: dict[str, tuple[int, ...]] = {"text": (3, 12), "image": (2,)}
LARGE: dict[str, tuple[int, ...]] = {"text": (16, 512), "image": (32,)}


def used_bytes() -> int:
    """Memory of the device in use."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert ctypes.CDLL("libcudart.so.13").cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    return total.value - free.value


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def small_shapes(tower: str) -> list[tuple[int, ...]]:
    """Every bucket that is small enough to be captured."""
    if tower == "image":
        return [(rows,) for rows in LADDER if rows <= GRAPH_IMAGES]
    return [
        (rows, tokens) for tokens in LADDER if tokens >= SHORTEST for rows in LADDER if rows * tokens <= GRAPH_TOKENS
    ]


def check_answer(found: dict[str, np.ndarray], rows: int) -> None:
    assert len(found) == OUTPUTS
    for value in found.values():
        assert value.dtype == np.float32 and value.shape[0] == rows and value.ndim == 2
        assert not (value.view(np.uint32) == NOT_THERE_YET).any()


def settle(session: OnnxRuntimeCudaSession) -> None:
    """Wait for what the GPU's thread was given, such as a capture."""
    session._thread.call(lambda: None)


def check_captures(record: Record) -> None:
    """A capture copies nothing from or to the host, and what it allocates stays while its graph is there."""
    entries = record.entries
    for begin in record.of("capture begin"):
        capture, thread = begin["capture"], begin["thread"]
        assert {copy["direction"] for copy in record.of("copy", capture=capture)} <= {"device"}
        first = entries.index(begin)
        last = next(n for n, e in enumerate(entries) if e["event"] == "capture end" and e["capture"] == capture)
        inside = [e for e in entries[first:last] if e["thread"] == thread]
        made = {e["address"] for e in inside if e["event"] == "allocate"}
        gone = record.of("destroy", what="graph")
        handles = {e["handle"] for e in record.of("create", what="graph", capture=capture)}
        until = next((n for n, e in enumerate(entries) if e in gone and e["handle"] in handles), len(entries))
        assert not made & {e["address"] for e in entries[last:until] if e["event"] == "free"}


def check_threads(record: Record) -> None:
    """One thread runs, captures, and has the device's memory; graphs are launched by others."""
    of_gpu = {e["thread"] for name in ("kernel", "product", "capture begin") for e in record.of(name)}
    assert len(of_gpu) == 1
    assert {e["thread"] for name in ("allocate", "free") for e in record.of(name, where="device")} <= of_gpu
    assert not of_gpu & {e["thread"] for e in record.of("graph launch")}


def check_traffic(record: Record) -> None:
    """One run: one copy in, one out, from and to pinned memory; one wait; nothing allocated."""
    assert record.faults == []
    assert len(record.of("copy", direction="in")) == 1
    assert len(record.of("copy", direction="out")) == 1
    assert {copy.get("host", "pinned") for copy in record.of("copy")} == {"pinned"}
    assert not any(copy["waits"] for copy in record.of("copy"))
    assert len(record.of("synchronise")) == 1 and not record.of("synchronise", what="device")
    assert not record.of("allocate") and not record.of("free")
    assert not record.of("host function")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", TOWERS)
def test_all_work_is_placed_on_the_device(
    open_session: Open, journal: Journal, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest,
    tower: str, kind: str,
) -> None:  # fmt: skip
    if kind == "operators":
        request.getfixturevalue("operators_bundle")  # the build prints what it does
    capfd.readouterr()
    mark = journal.mark()
    session = open_session(tower, kind)
    assert session.describe()["providers"][0] == PROVIDER
    assert host_operators(session._session) == {}
    assert journal.since(mark).faults == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_shape_is_captured_once_and_then_replayed(
    open_session: Open, journal: Journal, make_batch: MakeBatch, tower: str, kind: str
) -> None:
    session = open_session(tower, kind)
    batch = make_batch(tower, *SMALL[tower])
    mark = journal.mark()
    for _ in range(2):
        check_answer(session.run(batch), SMALL[tower][0])
    settle(session)
    warm = journal.since(mark)
    assert warm.faults == [] and session.graphs() == 1 and not warm.of("graph launch")
    check_captures(warm)
    check_threads(warm)
    captured = max(warm.captured().values(), key=len)  # jinaclip's operators capture products to time them
    mark = journal.mark()
    check_answer(session.run(batch), SMALL[tower][0])
    replay = journal.since(mark)
    check_traffic(replay)
    assert len(replay.of("graph launch")) == 1 and not replay.launches
    assert replay.threads == {threading.get_native_id()}
    # The graph does what a run without it does.
    run_before = warm.launches[-len(captured) :]
    assert [e.get("kernel") for e in captured] == [e.get("kernel") for e in run_before]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_run_without_a_graph(
    open_session: Open, journal: Journal, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch, tower: str, kind: str
) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "MOST_LARGE_GRAPHS", 0)
    session = open_session(tower, kind)
    batch = make_batch(tower, *LARGE[tower])
    for _ in range(3):
        check_answer(session.run(batch), LARGE[tower][0])
    mark = journal.mark()
    check_answer(session.run(batch), LARGE[tower][0])
    record = journal.since(mark)
    check_traffic(record)
    assert record.launches and not record.of("graph launch") and not record.of("capture begin")
    assert session.graphs() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_large_batch_is_captured_too(
    open_session: Open, journal: Journal, make_batch: MakeBatch, tower: str, kind: str
) -> None:
    session = open_session(tower, kind)
    batch = make_batch(tower, *LARGE[tower])
    mark = journal.mark()
    for _ in range(3):
        check_answer(session.run(batch), LARGE[tower][0])
    settle(session)
    check_captures(journal.since(mark))
    mark = journal.mark()
    check_answer(session.run(batch), LARGE[tower][0])
    record = journal.since(mark)
    check_traffic(record)
    assert len(record.of("graph launch")) == 1 and not record.launches and session.graphs() == 1


def test_graphs_are_bounded_and_stay(open_session: Open, journal: Journal, make_batch: MakeBatch) -> None:
    """Shapes that come when all graphs are there run without; no graph is replaced."""
    session = open_session("text", "fp16")
    shapes = [*small_shapes("text"), *((1, GRAPH_TOKENS + 64 * n) for n in range(1, MOST_LARGE_GRAPHS + 3))]
    assert len(small_shapes("text")) > MOST_SMALL_GRAPHS
    mark = journal.mark()
    for shape in shapes:
        for _ in range(3):
            check_answer(session.run(make_batch("text", *shape)), shape[0])
    settle(session)
    record = journal.since(mark)
    assert record.faults == [] and not record.of("destroy", what="graph")
    assert session.graphs() == record.growth("graph") == MOST_SMALL_GRAPHS + MOST_LARGE_GRAPHS
    mark = journal.mark()
    for shape in shapes:
        check_answer(session.run(make_batch("text", *shape)), shape[0])
    settle(session)
    record = journal.since(mark)
    assert len(record.of("graph launch")) == session.graphs() and not record.of("capture begin")


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("tower", TOWERS)
def test_memory_that_grows_takes_its_graphs_with_it(
    open_session: Open, journal: Journal, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch, tower: str, kind: str
) -> None:
    """Graphs hold the addresses of inputs and outputs: they end before that memory does, and are captured again."""
    monkeypatch.setattr(staging, "_LEAST", 1)
    session = open_session(tower, kind)
    small, large = make_batch(tower, *SMALL[tower]), make_batch(tower, *LARGE[tower])
    first = journal.mark()
    for _ in range(3):
        session.run(small)
    settle(session)
    old = {e["capture"] for e in journal.since(first).of("create", what="graph")}
    mark = journal.mark()
    session.run(large)
    record = journal.since(mark)
    assert session.graphs() == 0 and record.growth("graph") == -1
    moved = [e["event"] for e in record.entries if e["event"] in ("destroy", "free") and e.get("where") != "host"]
    assert moved[0] == "destroy" and "free" in moved
    for _ in range(2):
        for batch, shape in ((small, SMALL[tower]), (large, LARGE[tower])):
            check_answer(session.run(batch), shape[0])
            settle(session)
    record = journal.since(mark)
    assert record.faults == [] and session.graphs() == 2 and record.of("graph launch")
    assert not old & {e["capture"] for e in record.of("graph launch")}
    check_captures(journal.since(first))


@pytest.mark.parametrize("tower", TOWERS)
def test_only_the_batch_crosses_the_bus(
    open_session: Open, journal: Journal, make_batch: MakeBatch, tower: str
) -> None:
    """Pixels as bytes; ids with the offsets and positions of the texts; the vectors. Padded to whole units."""
    session = open_session(tower)
    (batch,) = make_batch(tower, *LARGE[tower]).values()
    mark = journal.mark()
    outputs = session.run(make_batch(tower, *LARGE[tower]))
    record = journal.since(mark)
    (copied,) = (copy["bytes"] for copy in record.of("copy", direction="in"))
    assert batch.nbytes <= copied <= 1.75 * batch.nbytes + 1024
    returned = sum(copy["bytes"] for copy in record.of("copy", direction="out"))
    vectors = sum(value.nbytes for value in outputs.values())
    assert vectors <= returned <= vectors + 1024


@pytest.mark.parametrize("tower", TOWERS)
def test_only_the_wanted_output_comes_back(
    open_session: Open, journal: Journal, make_batch: MakeBatch, tower: str
) -> None:
    session = open_session(tower)
    batch = make_batch(tower, *SMALL[tower])
    for name, expected in session.run(batch).items():
        for _ in range(3):  # plain runs, then the graph
            mark = journal.mark()
            found = session.run(batch, outputs=[name])
            settle(session)
            (returned,) = journal.since(mark).of("copy", direction="out")
            assert list(found) == [name] and found[name].shape == expected.shape
            assert returned["bytes"] == expected.nbytes
    empty = {name: value[:0] for name, value in batch.items()}
    assert list(session.run(empty, outputs=[name])) == [name]


def packed_batch(rng: random.Random, tokens: int) -> dict[str, np.ndarray]:
    """Texts of at most 512 tokens, so many tokens in all."""
    lengths = [512] * (tokens // 512)
    rest = tokens - sum(lengths)
    lengths += [rest] if rest else []
    ids = np.full((len(lengths), 512), 1, np.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = [rng.randrange(4, 400) for _ in range(length)]
    return {"input_ids": ids}


def test_products_of_nearly_the_same_size_share_an_algorithm(open_session: Open, journal: Journal) -> None:
    """Trying algorithms takes longer than a run: another number of tokens, at most an eighth away, tries none."""
    session, rng = open_session("text", "operators"), random.Random(0)

    def products(tokens: int) -> int:
        mark = journal.mark()
        session.run(packed_batch(rng, tokens))
        record = journal.since(mark)
        settle(session)
        return len([e for e in record.of("product") if not e["capture"]])

    first, again = products(6100), products(6100)  # sizes of no other test before: algorithms stay with the process
    assert first > again == products(5900) == products(5700)


@pytest.mark.parametrize("kind", PREPARED)
def test_memory_does_not_grow_with_the_number_of_shapes(open_session: Open, kind: str) -> None:
    """Runs of more than 2048 tokens are padded to tiles of 128 alone, but a run that is the largest so far by up to an
    eighth: the arena keeps memory for each of those.
    """
    session, rng = open_session("text", kind), random.Random(0)

    def grown(counts: Iterable[int]) -> int:
        before = used_bytes()
        for tokens in counts:
            session.run(packed_batch(rng, tokens))
        return used_bytes() - before

    largest = grown([9000])
    assert grown([rng.randrange(2049, 9216) for _ in range(60)]) <= 0.1 * largest
    assert grown(range(9216, 16384, 64)) <= 4 * largest  # 30 times as much where all are padded to tiles alone


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("tower", TOWERS)
def test_every_bucket_in_bounded_memory(
    open_session: Open, journal: Journal, make_batch: MakeBatch, tower: str, kind: str
) -> None:
    session = open_session(tower, kind)
    shapes = small_shapes(tower)
    mark = journal.mark()
    for _ in range(2):  # the second of a shape is captured
        for shape in shapes:
            check_answer(session.run(make_batch(tower, *shape)), shape[0])
    settle(session)
    first = journal.since(mark)
    assert first.faults == []
    assert 0 < session.graphs() == first.growth("graph") <= MOST_SMALL_GRAPHS
    check_captures(first)
    used, order = used_bytes(), random.Random(0)
    mark = journal.mark()
    for _ in range(2):
        order.shuffle(shapes)
        for shape in shapes:
            check_answer(session.run(make_batch(tower, *shape)), shape[0])
    again = journal.since(mark)
    assert again.faults == [] and again.captured() == {}
    assert used_bytes() == used


@pytest.mark.parametrize("kind", PREPARED)
def test_both_towers_from_many_threads(open_session: Open, journal: Journal, make_batch: MakeBatch, kind: str) -> None:
    mark = journal.mark()
    sessions = {tower: open_session(tower, kind) for tower in TOWERS}

    def run(number: int) -> None:
        tower = TOWERS[number % 2]
        shapes = [*small_shapes(tower)[:12], LARGE[tower]]
        shape = shapes[number // 2 % len(shapes)]
        check_answer(sessions[tower].run(make_batch(tower, *shape)), shape[0])

    for _ in range(3):  # with new threads each time: they share the graphs
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(run, range(120)))
    for session in sessions.values():
        settle(session)
    record = journal.since(mark)
    graphs = {tower: session.graphs() for tower, session in sessions.items()}
    assert record.growth("graph") == sum(graphs.values())
    assert graphs["image"] == len(small_shapes("image")) + 1 and graphs["text"] >= 10
    assert record.faults == []
    check_threads(record)
    check_captures(record)


@pytest.mark.parametrize("kind", PREPARED)
def test_ten_thousand_runs_leave_nothing_behind(
    open_session: Open, journal: Journal, make_batch: MakeBatch, kind: str
) -> None:
    sessions = {tower: open_session(tower, kind) for tower in TOWERS}
    shapes: dict[str, list[tuple[int, ...]]] = {"text": [(1, 7), (1, 20), (4, 30), (2, 60)], "image": [(1,), (2,)]}
    batches = [(tower, make_batch(tower, *shape)) for tower in TOWERS for shape in shapes[tower]]

    def run(count: int) -> None:
        for number in range(count):
            tower, batch = batches[number % len(batches)]
            sessions[tower].run(batch)

    run(600)
    gc.collect()
    used, resident, mark = used_bytes(), resident_bytes(), journal.mark()
    run(10_000)
    gc.collect()
    assert used_bytes() == used and resident_bytes() - resident <= 4 << 20
    record = journal.since(mark)
    assert record.faults == []
    assert not record.of("allocate") and not record.of("create")
    assert len(record.of("graph launch")) == len(record.of("synchronise")) == 10_000


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("tower", TOWERS)
def test_closing_while_busy(open_session: Open, journal: Journal, make_batch: MakeBatch, tower: str, kind: str) -> None:
    """Runs under way end, those that wait raise an error; nothing is left on the device."""
    keep = open_session("image" if tower == "text" else "text", kind)  # what the libraries take once for the process
    keep.run(make_batch("image" if tower == "text" else "text", 1))
    gc.collect()
    used, mark = used_bytes(), journal.mark()
    session = open_session(tower, kind)
    small, large = make_batch(tower, *SMALL[tower]), make_batch(tower, *LARGE[tower])
    answered, refused, running = [0], list[BackendError](), threading.Event()

    def work(number: int) -> None:
        for _ in range(10_000):
            try:
                session.run(large if number % 2 else small)
            except BackendError as error:
                refused.append(error)
                return
            answered[0] += 1
            if answered[0] > 20:
                running.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    assert running.wait(60)
    session.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(refused) == len(threads)
    assert all("closed" in str(error) for error in refused), {str(error) for error in refused}
    session.close()
    gc.collect()
    record = journal.since(mark)
    assert record.faults == []
    assert used_bytes() <= used and record.growth("graph") == 0


@pytest.mark.parametrize("kind", PREPARED)
def test_opening_and_closing_leaves_nothing_behind(
    open_session: Open, journal: Journal, make_batch: MakeBatch, kind: str
) -> None:
    def once() -> None:
        for tower in TOWERS:
            session = open_session(tower, kind)
            for _ in range(3):
                session.run(make_batch(tower, *SMALL[tower]))
            session.close()
        gc.collect()

    once()
    for _ in range(10):
        once()
    used, resident, mark = used_bytes(), resident_bytes(), journal.mark()
    for _ in range(100):
        once()
    assert resident_bytes() - resident <= 8 << 20
    record = journal.since(mark)
    assert record.faults == [] and used_bytes() <= used
    assert [record.growth(what) for what in ("stream", "event", "graph")] == [0, 0, 0]
    pinned = sum(e["bytes"] for e in record.of("allocate", where="host"))
    assert len(record.of("allocate", where="host")) == len(record.of("free", where="host")), pinned


def test_the_arena_does_not_shrink_below_a_graph(open_session: Open, journal: Journal, make_batch: MakeBatch) -> None:
    session = open_session("text")
    small, large = make_batch("text", *SMALL["text"]), make_batch("text", *LARGE["text"])
    session.run(large, release_memory=True)
    for _ in range(3):
        session.run(small)
    assert session.graphs() == 1
    mark = journal.mark()
    with pytest.raises(BackendError, match="release_memory"):
        session.run(large, release_memory=True)
    session.run(small)
    assert journal.since(mark).faults == []


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("failing", ["captured product", "captured __cudaLaunchKernel", "cudaGraphInstantiate"])
def test_a_capture_that_fails_is_not_tried_again(
    open_session: Open, journal: Journal, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, tower: str, failing: str,
) -> None:  # fmt: skip
    batch, other = make_batch(tower, *SMALL[tower]), make_batch(tower, *LARGE[tower])
    session = open_session(tower)
    session.run(batch)
    mark = journal.mark()
    monkeypatch.setenv("STAND_IN_FAIL", failing)
    check_answer(session.run(batch), SMALL[tower][0])  # behind it the capture fails
    settle(session)
    monkeypatch.delenv("STAND_IN_FAIL")
    record = journal.since(mark)
    assert len(record.of("injected failure")) == 1
    # After a run that failed ONNX Runtime waits for the device, which no capture outlives.
    assert all(fault.startswith("cudaDeviceSynchronize") for fault in record.faults) and record.growth("graph") == 0
    mark = journal.mark()
    for _ in range(4):
        check_answer(session.run(batch), SMALL[tower][0])
    settle(session)
    record = journal.since(mark)
    assert record.faults == [] and session.graphs() == 0
    assert not record.of("capture begin") and record.launches
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "without a CUDA graph" in warning and len(warning.splitlines()) == 1
    for _ in range(3):
        check_answer(session.run(other), LARGE[tower][0])
    settle(session)
    assert session.graphs() == 1


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    "failing", ["product", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaEventSynchronize", "cudaStreamSynchronize"]
)
def test_runs_that_fail_leave_every_slot_usable(
    open_session: Open, journal: Journal, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch,
    tower: str, failing: str,
) -> None:  # fmt: skip
    """Plain runs and replays, one after the other and more than there are slots."""
    replayed, plain = make_batch(tower, *SMALL[tower]), make_batch(tower, *LARGE[tower])
    session = open_session(tower)
    for _ in range(3):
        session.run(replayed)
    mark = journal.mark()
    monkeypatch.setattr(onnxruntime_cuda, "MOST_LARGE_GRAPHS", 0)
    monkeypatch.setenv("STAND_IN_FAIL", failing)
    failed = 0
    for batch in (replayed, plain) * (RUNS_AT_ONCE + 1):
        try:
            session.run(batch)
        except BackendError as error:
            failed += 1
            assert len(str(error).splitlines()) == 1
    assert failed or failing == "cudaStreamSynchronize"  # which no run calls
    monkeypatch.delenv("STAND_IN_FAIL")
    with ThreadPoolExecutor(2 * RUNS_AT_ONCE) as pool:
        for _ in range(4):
            for found in pool.map(session.run, [replayed] * 8):
                check_answer(found, SMALL[tower][0])
            for found in pool.map(session.run, [plain] * 4):
                check_answer(found, LARGE[tower][0])
    assert journal.since(mark).faults == [] and session.graphs() == 1


def test_a_session_that_closes_before_its_capture(
    open_session: Open, journal: Journal, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, keep = open_session("text"), open_session("text")
    for _ in range(3):
        keep.run(make_batch("text", *SMALL["text"]))
    capture, closing = session._capture, threading.Event()

    def late(work: Run) -> None:
        while not session._closed:
            closing.wait(0.01)
        capture(work)

    monkeypatch.setattr(session, "_capture", late)
    mark = journal.mark()
    for _ in range(2):
        session.run(make_batch("text", *SMALL["text"]))
    session.close()
    record = journal.since(mark)
    assert record.faults == [] and not record.of("capture begin")
    mark = journal.mark()
    check_answer(keep.run(make_batch("text", *SMALL["text"])), SMALL["text"][0])
    assert len(journal.since(mark).of("graph launch")) == 1 and journal.since(mark).faults == []


def test_a_session_that_is_dropped_is_freed(bundle: Path, journal: Journal, make_batch: MakeBatch) -> None:
    def once() -> None:
        session, _ = OnnxRuntimeCuda(gpu(0)).open(Bundle(bundle), "text", "fp16")
        assert isinstance(session, OnnxRuntimeCudaSession)
        for _ in range(3):
            session.run(make_batch("text", *SMALL["text"]))
        thread = session._thread
        del session
        gc.collect()
        thread.call(lambda: None)

    once()
    used, mark = used_bytes(), journal.mark()
    for _ in range(3):
        once()
    record = journal.since(mark)
    assert record.faults == [] and used_bytes() <= used
    assert [record.growth(what) for what in ("stream", "event", "graph")] == [0, 0, 0]


def test_too_little_memory_is_said_and_survived(
    open_session: Open, journal: Journal, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session("text")
    small = make_batch("text", *SMALL["text"])
    for _ in range(3):
        session.run(small)
    monkeypatch.setenv("STAND_IN_MEMORY_MIB", str((used_bytes() >> 20) + 1))
    with pytest.raises(BackendError, match="memory") as caught:
        session.run(make_batch("text", *LARGE["text"]))
    assert len(str(caught.value).splitlines()) == 1 and "MiB" in str(caught.value)
    monkeypatch.delenv("STAND_IN_MEMORY_MIB")
    mark = journal.mark()
    check_answer(session.run(small), SMALL["text"][0])
    check_answer(session.run(make_batch("text", *LARGE["text"])), LARGE["text"][0])
    assert journal.since(mark).faults == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_touch_cuda(open_session: Open, journal: Journal, make_batch: MakeBatch) -> None:
    session = open_session("text")
    batch = make_batch("text", *SMALL["text"])
    session.run(batch)
    mark = journal.mark()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            session.run(batch)
        except BackendError as error:
            status = 0 if "fork" in str(error) else 2
        session.close()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert journal.since(mark).entries == []
    session.run(batch)


def documented_launches() -> dict[tuple[str, str], int]:
    """Launches a block, by tower and kind of graph, from the table of docs/gpu.md."""
    row = rf"^\| (text|image) \| ({'|'.join(KINDS)}) \| (\d+) \|"
    rows = re.findall(row, DOCS.read_text("utf-8"), re.MULTILINE)
    return {(tower, kind): int(count) for tower, kind, count in rows}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", TOWERS)
def test_launches_a_block_are_as_documented(
    open_session: Open, journal: Journal, make_batch: MakeBatch, tower: str, kind: str
) -> None:
    session = open_session(tower, kind)
    session.run(make_batch(tower, *LARGE[tower]))  # which tries algorithms for products
    mark = journal.mark()
    session.run(make_batch(tower, *LARGE[tower]))
    assert launches_per_block(journal.since(mark).launches) == documented_launches()[tower, kind]


@pytest.mark.parametrize("kind", ["prepared", "operators"])
def test_what_is_no_batch_is_refused(open_session: Open, kind: str) -> None:
    """A host that calls a session itself must not get vectors of something else."""
    text, image = open_session("text", kind), open_session("image", kind)
    for session, name, wrong, words in (
        (text, "input_ids", np.zeros((2, 3), np.float32), "is float32, expected int64"),
        (text, "input_ids", np.zeros(3, np.int64), r"has shape \[3\], expected \[B, T\]"),
        (text, "input_ids", np.zeros((1, 2, 3), np.int64), "expected"),
        (image, "pixel_values", np.zeros((1, 7, 7, 3), np.uint8), r"has shape \[1, 7, 7, 3\]"),
        (image, "pixel_values", np.zeros((1, 140, 140, 3), np.float32), "is float32, expected uint8"),
    ):
        with pytest.raises(InputError, match=words):
            session.run({name: wrong})
    with pytest.raises(BackendError, match="the graph's input is input_ids"):
        text.run({"input_ids": np.zeros((1, 3), np.int64), "other": np.zeros(1)})
    assert len(text.run({"input_ids": np.array([[0, 5, 2]], np.int32)})) == 2  # integers of another width are ids too


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_a_library_of_other_operators_is_not_used(tmp_path: Path) -> None:
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text(
        "int jinaclip_cuda_operators_version(void) { return 1; }\n"
        "const char* jinaclip_cuda_device_error(int device) { return (void*)0; }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    assert "have version 1, expected" in str(cuda_operators._problem(library, gpu(0)))
