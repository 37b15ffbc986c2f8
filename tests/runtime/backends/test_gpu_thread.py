"""The thread of a GPU: one for all, in order, and what a fork leaves of it."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jinaclip.backends.cuda.gpu_thread import gpu_thread


def test_all_work_runs_in_one_thread_in_order() -> None:
    thread = gpu_thread(7)
    assert gpu_thread(7) is thread and gpu_thread(8) is not thread
    done: list[int] = []
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(lambda _: thread.call(lambda: threading.current_thread().name), range(100)))
    assert len(names) == 1
    for future in [thread.submit(done.append, number) for number in range(100)]:
        future.result()
    assert done == list(range(100))


def test_errors_reach_the_caller_and_the_thread_goes_on() -> None:
    thread = gpu_thread(7)
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)
    assert thread.call(lambda: 5) == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_gets_a_thread_of_its_own() -> None:
    before = gpu_thread(7)
    before.call(lambda: None)
    child = os.fork()
    if child == 0:
        os._exit(0 if gpu_thread(7) is not before and gpu_thread(7).call(lambda: 3) == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
