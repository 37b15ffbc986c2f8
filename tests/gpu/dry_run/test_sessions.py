"""ONNX Runtime's sessions on a GPU: placement, captures, copies, waits, threads and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jinaclip.buckets import LADDER, SHORTEST
from jinaclip.errors import BackendError
from jinaclip.onnxruntime_cuda import GRAPH_IMAGES, GRAPH_TOKENS, MOST_LARGE_GRAPHS, MOST_SMALL_GRAPHS, PROVIDER, host_operators
from tests.gpu.dry_run.conftest import KINDS, Open
from tests.gpu.dry_run.journal import Journal, Record, launches_per_block

DOCS = Path(__file__).resolve().parents[3] / "docs/gpu.md"
TOWERS = ("text", "image")
PREPARED = ("prepared", "operators")
OUTPUTS = 2  # of each graph: embeddings as they are and of length 1
NOT_THERE_YET = 0xFBFBFBFB  # what pinned memory holds until the copy to it has run
MakeBatch = Callable[..., dict[str, np.ndarray]]
# A shape that is captured, and one that is too large for it.
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


def check_traffic(record: Record) -> None:
    """One run: one copy in, at most one for each output, all from and to pinned memory; one wait; nothing allocated."""
    assert record.faults == []
    assert len(record.of("copy", direction="in")) == 1
    assert 1 <= len(record.of("copy", direction="out")) <= OUTPUTS
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
        request.getfixturevalue("operators_bundle")  # the build tells what it does
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
    for _ in range(3):
        check_answer(session.run(batch), SMALL[tower][0])
    warm = journal.since(mark)
    assert warm.faults == [] and session.graphs() == 1
    captured = max(warm.captured().values(), key=len)  # jinaclip's operators capture products to time them
    mark = journal.mark()
    check_answer(session.run(batch), SMALL[tower][0])
    replay = journal.since(mark)
    check_traffic(replay)
    assert len(replay.of("graph launch")) == 1 and not replay.launches
    # The graph does what a run without it does.
    run_before = warm.launches[-len(captured) :]
    assert [e.get("kernel") for e in captured] == [e.get("kernel") for e in run_before]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_large_batch_runs_without_a_graph(
    open_session: Open, journal: Journal, make_batch: MakeBatch, tower: str, kind: str
) -> None:
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


@pytest.mark.parametrize("tower", TOWERS)
def test_only_the_batch_crosses_the_bus(
    open_session: Open, journal: Journal, make_batch: MakeBatch, tower: str
) -> None:
    """Pixels as bytes; ids with what tells texts apart; the vectors. Padded to whole units of memory."""
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
    first = journal.since(mark)
    assert first.faults == []
    assert 0 < session.graphs() == first.growth("graph") <= MOST_SMALL_GRAPHS
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
    record = journal.since(mark)
    assert record.faults == []
    graphs = {tower: session.graphs() for tower, session in sessions.items()}
    assert record.growth("graph") == sum(graphs.values())
    assert graphs["image"] == len(small_shapes("image")) and graphs["text"] >= 10
    assert len(record.threads) == 1


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
    """Runs under way end, those that wait are told; nothing is left on the device."""
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
    used, mark = used_bytes(), journal.mark()
    for _ in range(5):
        once()
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
@pytest.mark.parametrize("failing", ["product", "captured product", "cudaGraphInstantiate"])
def test_a_run_that_fails_leaves_no_half_graph(
    open_session: Open, journal: Journal, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch,
    tower: str, failing: str,
) -> None:  # fmt: skip
    """ONNX Runtime ends the capture of a run that fails, and would replay what was captured up to there."""
    batch = make_batch(tower, *SMALL[tower])
    healthy = open_session(tower)
    mark = journal.mark()
    for _ in range(3):
        healthy.run(batch)
    (whole,) = map(len, journal.since(mark).captured().values())
    begin = journal.mark()
    session = open_session(tower)
    session.run(batch)  # the next is captured
    monkeypatch.setenv("STAND_IN_FAIL", failing)
    try:
        session.run(batch)
    except BackendError as error:
        assert len(str(error).splitlines()) == 1
    monkeypatch.delenv("STAND_IN_FAIL")
    for _ in range(4):
        mark = journal.mark()
        check_answer(session.run(batch), SMALL[tower][0])
        record = journal.since(mark)
        replayed = [journal.since(begin).captured().get(e["capture"], []) for e in record.of("graph launch")]
        assert max([len(record.launches), *map(len, replayed)]) >= whole


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
    mark = journal.mark()
    session.run(make_batch(tower, *LARGE[tower]))
    assert launches_per_block(journal.since(mark).launches) == documented_launches()[tower, kind]
