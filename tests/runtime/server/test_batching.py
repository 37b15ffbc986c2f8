"""The queue of a server: every caller gets his own vector, nobody waits for ever, and who left is not run for."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jinaclip import ClipModel
from jinaclip.backends.cost import CPU_COST, GPU_COST, UNPADDED_CPU_COST, RunCost
from jinaclip.errors import BackendError, Overloaded
from jinaclip.server.admission import Limiter
from jinaclip.server.queue import Batcher, QueueClosed, choose_images, choose_texts
from tests.conftest import TEXTS
from tests.runtime.test_packing import FULL
from tests.support.running import until


class Gate:
    """A run that waits until it may go on, and remembers what it was given."""

    def __init__(self) -> None:
        self.go, self.seen = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []
        self.alone: list[bool] = []

    def __call__(self, items: Sequence[int], alone: bool) -> np.ndarray:
        self.alone.append(alone)
        self.batches.append(list(items))
        self.seen.set()
        assert self.go.wait(20)
        return np.array(items, np.float32)[:, None]


def everything(items: Sequence[int]) -> list[int]:
    return list(range(len(items)))


def test_vectors_are_clip_models(small_bundle: Path) -> None:
    with ClipModel(small_bundle) as model:
        session = model.text_encoder.session
        batcher: Batcher[list[int]] = Batcher(
            "text",
            lambda rows, alone: model.text_encoder.run(rows),
            lambda rows: choose_texts(rows, model.bundle.tower("text"), session.cost),
        )
        texts = [f"{text} {number}" for number in range(12) for text in TEXTS]
        expected = model.encode_text(texts, normalize_embeddings=False)

        def one(index: int) -> np.ndarray:
            (future,) = batcher.submit(model.text_encoder.prepare([texts[index]]))
            return future.result(60)

        with ThreadPoolExecutor(16) as pool:
            found = np.stack(list(pool.map(one, range(len(texts)))))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        assert batcher.close(5) == 0
        assert batcher.counts.run == len(texts) and sum(batcher.counts.batches.values()) <= len(texts)


def test_what_gathers_while_a_batch_runs_runs_together() -> None:
    gate = Gate()
    batcher = Batcher("item", gate, everything)
    (first,) = batcher.submit([0])
    assert gate.seen.wait(5)
    others = [future for number in range(1, 6) for future in batcher.submit([number])]
    assert batcher.waiting() == 5 and batcher.oldest() >= 0
    gate.go.set()
    assert [future.result(5)[0] for future in (first, *others)] == [0, 1, 2, 3, 4, 5]
    assert gate.batches == [[0], [1, 2, 3, 4, 5]] and batcher.counts.batches == {1: 1, 5: 1}
    batcher.close(1)


def test_a_run_is_told_whether_it_is_alone() -> None:
    gate = Gate()
    batcher = Batcher("item", gate, lambda items: [0], workers=2)
    futures = batcher.submit([0])
    until(lambda: gate.alone == [True])
    futures += batcher.submit([1])  # beside the first
    until(lambda: gate.alone == [True, False])
    futures += batcher.submit([2, 3])
    gate.go.set()
    assert [future.result(5)[0] for future in futures] == [0, 1, 2, 3] and gate.alone[2] is False
    batcher.close(5)


def test_items_of_one_caller_keep_every_worker_busy() -> None:
    """Once only one worker was woken for them, and the others idled until it was done."""
    gate = Gate()
    batcher = Batcher("item", gate, lambda items: [0], workers=3)
    futures = batcher.submit([0, 1, 2])
    until(lambda: sorted(gate.batches) == [[0], [1], [2]])
    gate.go.set()
    assert [future.result(5)[0] for future in futures] == [0, 1, 2]
    batcher.close(5)


def test_a_worker_whose_item_another_took_goes_on() -> None:
    """While both wait for company, one of them takes all; the other one's thread once ended there."""
    gate = Gate()
    gate.go.set()
    batcher = Batcher("item", gate, everything, workers=2, gather_s=0.1)
    for number in range(5):
        for future in (*batcher.submit([number]), *batcher.submit([number])):
            future.result(5)
    gate.go.clear()
    gate.batches.clear()
    first = batcher.submit([7])
    until(lambda: gate.batches == [[7]])
    second = batcher.submit([8])  # the first still runs: the other worker has to be there
    until(lambda: gate.batches == [[7], [8]])
    gate.go.set()
    assert [future.result(5)[0] for future in (*first, *second)] == [7, 8]
    batcher.close(5)


def test_who_left_is_not_run_for() -> None:
    gate = Gate()
    batcher = Batcher("item", gate, everything)
    batcher.submit([0])
    assert gate.seen.wait(5)
    futures = batcher.submit([1, 2, 3, 4])
    for index in (0, 2, 3):
        assert futures[index].cancel()
    (later,) = batcher.submit([5])
    gate.go.set()
    assert futures[1].result(5) == [2] and later.result(5) == [5]
    assert gate.batches == [[0], [2, 5]] and batcher.counts.dropped == 3
    batcher.close(1)


def test_limiter_refuses_all_or_nothing() -> None:
    limiter = Limiter("texts", 3)
    limiter.acquire(2)
    with pytest.raises(
        Overloaded, match="2 texts are queued or being processed, and 2 more would exceed the limit of 3; retry later"
    ):
        limiter.acquire(2)
    with pytest.raises(BackendError), limiter.reserved(1):
        assert limiter.in_use == 3
        raise BackendError("given back all the same")
    limiter.release(2)
    assert (limiter.in_use, limiter.refused) == (0, 2)


def test_an_item_waits_for_company_no_longer_than_it_may() -> None:
    gate = Gate()
    gate.go.set()
    batcher = Batcher("item", gate, lambda items: list(range(min(3, len(items)))), gather_s=1.0)
    start = time.monotonic()
    futures = [future for number in range(2) for future in batcher.submit([number])]
    assert [future.result(5)[0] for future in futures] == [0, 1] and time.monotonic() - start >= 1.0
    start = time.monotonic()
    full = [future for number in range(4) for future in batcher.submit([number])]  # three run as soon as there are four
    assert full[2].result(5) == [2] and time.monotonic() - start < 1.0
    assert full[3].result(5) == [3] and gate.batches == [[0, 1], [0, 1, 2], [3]]
    assert batcher.close(1) == 0


def test_runs_are_told_of() -> None:
    told: list[tuple[int, bool]] = []
    batcher = Batcher(
        "item", lambda items, alone: np.array(items, np.float32)[:, None], everything,
        observe=lambda waited, ran: told.append((len(waited), min(*waited, ran) >= 0)),
    )  # fmt: skip
    for future in batcher.submit([1, 2]):
        future.result(5)
    batcher.close(1)
    assert sum(count for count, _ in told) == 2 and all(fine for _, fine in told)


def test_an_error_reaches_those_of_its_batch_alone() -> None:
    def run(items: Sequence[int], alone: bool) -> np.ndarray:
        if 13 in items:
            raise BackendError("it failed")
        return np.array(items, np.float32)[:, None]

    batcher = Batcher("item", run, lambda items: [0])
    futures = [future for number in (1, 13, 2) for future in batcher.submit([number])]
    assert futures[0].result(5) == [1] and futures[2].result(5) == [2]
    with pytest.raises(BackendError, match="it failed"):
        futures[1].result(5)
    batcher.close(1)
    assert (batcher.counts.run, batcher.counts.failed, batcher.counts.failing) == (2, 1, 0)


def test_vectors_that_are_missing_are_an_error_and_not_a_wait() -> None:
    batcher = Batcher("item", lambda items, alone: np.zeros((len(items) - 1, 1), np.float32), everything)
    for _ in range(2):  # and the thread goes on
        (future,) = batcher.submit([1])
        with pytest.raises(BackendError, match="a batch of 1 items returned 0 vectors"):
            future.result(5)
    batcher.close(1)


def test_closing_finishes_what_was_accepted() -> None:
    gate = Gate()
    batcher = Batcher("item", gate, lambda items: [0])
    futures = batcher.submit([1, 2, 3])
    assert gate.seen.wait(5)
    threading.Timer(0.2, gate.go.set).start()
    assert batcher.close(10) == 0
    assert [future.result(0)[0] for future in futures] == [1, 2, 3]
    with pytest.raises(QueueClosed, match="closed"):
        batcher.submit([4])


def test_what_is_not_finished_in_time_is_told() -> None:
    gate = Gate()
    batcher = Batcher("item", gate, lambda items: [0])
    futures: list[Future[np.ndarray]] = batcher.submit([1, 2, 3])
    assert gate.seen.wait(5)
    start = time.monotonic()
    assert batcher.close(0.2) == 2 and time.monotonic() - start < 5
    for future in futures[1:]:
        with pytest.raises(BackendError, match="shut down before"):
            future.result(0)
    gate.go.set()
    assert futures[0].result(5) == [1]


@pytest.mark.parametrize("cost", [CPU_COST, UNPADDED_CPU_COST, GPU_COST], ids=["cpu", "unpadded", "gpu"])
@pytest.mark.parametrize("seed", range(5))
def test_texts_that_run_together_are_of_like_length(cost: RunCost, seed: int) -> None:
    lengths = np.clip(np.random.default_rng(seed).lognormal(3.2, 1, 200), 2, 8192).astype(int).tolist()
    rows = [[0] * length for length in lengths]
    served = 0
    while rows:
        chosen = choose_texts(rows, FULL, cost)
        assert 0 in chosen and len(set(chosen)) == len(chosen)  # the one that waited longest is always served
        batch = [len(rows[i]) for i in chosen]
        places = len(batch) * max(batch)
        if cost is UNPADDED_CPU_COST:
            padding = 0.05 + max(batch) / 1000
            assert sum(batch) + padding * (places - sum(batch)) <= cost.tokens or len(batch) == 1
        else:
            assert places <= cost.tokens or len(batch) == 1
        served += len(chosen)
        rows = [row for index, row in enumerate(rows) if index not in chosen]
    assert served == 200


def test_images_run_in_the_order_they_came() -> None:
    pictures = [np.zeros(1)] * 40
    assert choose_images(pictures, CPU_COST) == [0]
    assert choose_images(pictures, GPU_COST) == list(range(16)) and choose_images(pictures[:3], GPU_COST) == [0, 1, 2]
