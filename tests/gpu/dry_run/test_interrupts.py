"""A handler of a signal that raises, as Ctrl-C does, at any point of a run: nothing is lost or used twice."""

from __future__ import annotations

import gc
import random
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from jinaclip.backends.onnxruntime.cuda import RUNS_AT_ONCE
from tests.gpu.dry_run.conftest import Open
from tests.gpu.dry_run.journal import Journal
from tests.gpu.dry_run.test_sessions import LARGE, PREPARED, SMALL, TOWERS, check_answer, used_bytes

MakeBatch = Callable[..., dict[str, np.ndarray]]
Interrupt = Callable[[float], object]
INTERRUPTS = 400


class Interrupted(BaseException):
    """What the handler raises."""


def _raise(*_: object) -> None:
    raise Interrupted


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    """interrupt(seconds): raise Interrupted in the main thread after so long, unless it is asked again with 0."""
    before = signal.signal(signal.SIGALRM, _raise)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# Python drops what is raised while it frees an object.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("tower", TOWERS)
def test_interrupted_runs_leave_every_slot_usable(
    open_session: Open, journal: Journal, make_batch: MakeBatch, interrupt: Interrupt,
    tower: str, kind: str,
) -> None:  # fmt: skip
    session = open_session(tower, kind)
    replayed, plain = make_batch(tower, *SMALL[tower]), make_batch(tower, *LARGE[tower])
    for _ in range(3):
        session.run(replayed)
    mark, chance, caught = journal.mark(), random.Random(0), 0
    for number in range(INTERRUPTS):
        try:
            interrupt(chance.uniform(1e-5, 5e-4))
            for _ in range(50):
                session.run(plain if number % 8 == 7 else replayed)
            interrupt(0)
        except Interrupted:
            caught += 1
    assert caught > INTERRUPTS // 2
    gc.collect()
    # All slots are there, each once: so many runs are under way at the same time, and all of them end.
    done: list[int] = []

    def run() -> None:
        for _ in range(50):
            check_answer(session.run(replayed), SMALL[tower][0])
        done.append(1)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2 * RUNS_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == len(threads)
    assert journal.since(mark).faults == []
    session.close()


def test_closing_that_is_interrupted_can_be_done_again(
    open_session: Open, journal: Journal, make_batch: MakeBatch, interrupt: Interrupt
) -> None:
    chance = random.Random(0)
    used, mark = 0, journal.mark()
    for number in range(40):
        session = open_session("text")
        for _ in range(3):
            session.run(make_batch("text", *SMALL["text"]))
        try:
            interrupt(chance.uniform(1e-5, 3e-3))
            session.close()
            interrupt(0)
        except Interrupted:
            pass
        session.close()
        del session
        gc.collect()
        if number == 0:
            used = used_bytes()
    record = journal.since(mark)
    assert record.faults == [] and used_bytes() <= used
    assert [record.growth(what) for what in ("stream", "event", "graph")] == [0, 0, 0]
