"""The pool of workers and slots: a handler of a signal that raises loses no item, and gives none back twice."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator

import pytest

from jinaclip.backends.pool import Pool


class Interrupted(BaseException):
    """What the handler raises."""


@pytest.fixture
def alarm() -> Iterator[None]:
    def handler(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def check_whole(pool: Pool[str], items: list[str]) -> None:
    loans = [pool.borrow() for _ in items]
    assert sorted(str(loan.item) for loan in loans) == items
    for loan in loans:
        loan.give_back()
        loan.give_back()


# Python drops what is raised while it frees an object.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@pytest.mark.usefixtures("alarm")
def test_interrupts_lose_nothing() -> None:
    items, chance, caught = ["a", "b"], random.Random(0), 0
    pool = Pool(items)
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            with pool.borrow() as loan:
                assert loan.item in items

    def use() -> None:  # its loans end with it
        with pool.borrow() as loan, loan.take_over() as taken:
            assert taken.item in items and loan.item is None

    thread = threading.Thread(target=others, daemon=True)
    thread.start()
    for _ in range(500):
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 3e-4))
            for _ in range(1000):
                use()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            caught += 1
    stop.set()
    thread.join(60)
    assert not thread.is_alive() and caught > 50
    check_whole(pool, items)


def test_an_item_that_was_given_back_is_not_taken_over() -> None:
    pool = Pool(["a"])
    loan = pool.borrow()
    loan.give_back()
    assert loan.take_over().item is None
    check_whole(pool, ["a"])
    del loan


def test_a_dropped_loan_is_given_back() -> None:
    pool = Pool(["a"])
    pool.borrow()
    check_whole(pool, ["a"])
    pool.close()
    assert pool.borrow().item is None
