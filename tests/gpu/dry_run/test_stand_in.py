"""The stand-in itself: it allows and forbids what CUDA's documentation says, so that the other tests mean something."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.gpu.dry_run.journal import Journal

GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, UNSUPPORTED, INVALIDATED, WRONG_THREAD = 1, 2, 700, 900, 901, 908
TO_DEVICE, TO_HOST = 1, 2


@pytest.fixture
def cudart(journal: Journal) -> Any:
    return ctypes.CDLL("libcudart.so.13")


@pytest.fixture
def stream(cudart: Any) -> Iterator[ctypes.c_void_p]:
    made = ctypes.c_void_p()
    assert cudart.cudaStreamCreateWithFlags(ctypes.byref(made), 1) == 0
    yield made
    assert cudart.cudaStreamDestroy(made) == 0


def memory(cudart: Any, size: int = 4096) -> ctypes.c_void_p:
    pointer = ctypes.c_void_p()
    assert cudart.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0
    return pointer


def in_thread(call: Callable[[], int]) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


UNSAFE: dict[str, Callable[[Any], int]] = {
    "cudaMalloc": lambda rt: rt.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1)),
    "cudaFree": lambda rt: rt.cudaFree(None),
    "cudaHostAlloc": lambda rt: rt.cudaHostAlloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1), 0),
    "cudaDeviceSynchronize": lambda rt: rt.cudaDeviceSynchronize(),
    "cudaStreamSynchronize": lambda rt: rt.cudaStreamSynchronize(None),
}


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize(
    ("mode", "other_thread", "expected"),
    [
        (GLOBAL, False, UNSUPPORTED),
        (GLOBAL, True, UNSUPPORTED),
        (THREAD_LOCAL, False, UNSUPPORTED),
        (THREAD_LOCAL, True, 0),
        (RELAXED, False, 0),
    ],
)
def test_unsafe_calls_break_a_capture(
    cudart: Any, stream: Any, journal: Journal, name: str, mode: int, other_thread: bool, expected: int
) -> None:
    mark = journal.mark()
    assert cudart.cudaStreamBeginCapture(stream, mode) == 0
    call = UNSAFE[name]
    if name == "cudaDeviceSynchronize":
        expected = UNSUPPORTED  # it would wait for the stream that captures
    assert (in_thread(lambda: call(cudart)) if other_thread else call(cudart)) == expected
    graph = ctypes.c_void_p()
    assert cudart.cudaStreamEndCapture(stream, ctypes.byref(graph)) == (INVALIDATED if expected else 0)
    assert bool(journal.since(mark).faults) == bool(expected)
    cudart.cudaGetLastError()


def test_synchronous_copies_break_a_capture(cudart: Any, stream: Any) -> None:
    pointer, host = memory(cudart), ctypes.create_string_buffer(4096)
    assert cudart.cudaStreamBeginCapture(stream, GLOBAL) == 0
    assert in_thread(lambda: cudart.cudaMemcpy(pointer, host, ctypes.c_size_t(4096), TO_DEVICE)) == UNSUPPORTED
    assert cudart.cudaStreamEndCapture(stream, ctypes.byref(ctypes.c_void_p())) == INVALIDATED
    assert cudart.cudaFree(pointer) == 0


def test_a_capture_ends_in_its_thread(cudart: Any, stream: Any) -> None:
    graph = ctypes.c_void_p()
    assert cudart.cudaStreamBeginCapture(stream, GLOBAL) == 0
    assert in_thread(lambda: cudart.cudaStreamEndCapture(stream, ctypes.byref(graph))) == WRONG_THREAD
    assert cudart.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert cudart.cudaGraphDestroy(graph) == 0


def test_captured_copies_are_made_by_the_graph_alone(cudart: Any, stream: Any) -> None:
    pointer, host = memory(cudart), ctypes.create_string_buffer(b"a" * 64, 64)
    back = ctypes.create_string_buffer(64)
    size = ctypes.c_size_t(64)
    assert cudart.cudaStreamBeginCapture(stream, GLOBAL) == 0
    assert cudart.cudaMemcpyAsync(pointer, host, size, TO_DEVICE, stream) == 0
    assert cudart.cudaMemcpyAsync(back, pointer, size, TO_HOST, stream) == 0
    graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
    assert cudart.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert back.raw == bytes(64)
    assert cudart.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)) == 0
    for letter in (b"a", b"b"):
        host.raw = letter * 64
        assert cudart.cudaGraphLaunch(executable, stream) == cudart.cudaStreamSynchronize(stream) == 0
        assert back.raw == letter * 64
    assert cudart.cudaFree(pointer) == cudart.cudaGraphLaunch(executable, stream) == 0
    assert cudart.cudaStreamSynchronize(stream) == ILLEGAL_ADDRESS  # its memory is gone
    assert cudart.cudaGraphExecDestroy(executable) == 0 and cudart.cudaGraphDestroy(graph) == 0
    cudart.cudaGetLastError()


def test_copies_to_freed_memory_are_refused(cudart: Any, journal: Journal) -> None:
    pointer, host = memory(cudart), ctypes.create_string_buffer(4097)
    assert cudart.cudaMemcpy(pointer, host, ctypes.c_size_t(4096), TO_DEVICE) == 0
    assert cudart.cudaMemcpy(pointer, host, ctypes.c_size_t(4097), TO_DEVICE) == INVALID_VALUE
    assert cudart.cudaFree(pointer) == 0
    mark = journal.mark()
    assert cudart.cudaMemcpy(pointer, host, ctypes.c_size_t(4096), TO_DEVICE) == INVALID_VALUE
    assert cudart.cudaFree(pointer) == INVALID_VALUE
    assert len(journal.since(mark).faults) == 2


def test_pinned_memory_belongs_to_a_copy_until_it_has_run(cudart: Any, stream: Any, journal: Journal) -> None:
    pointer, size = memory(cudart), ctypes.c_size_t(64)
    source, target = (ctypes.create_string_buffer(letter * 64, 64) for letter in (b"a", b"b"))
    for host in (source, target):
        assert cudart.cudaHostRegister(host, size, 0) == 0
    event = ctypes.c_void_p()
    assert cudart.cudaEventCreateWithFlags(ctypes.byref(event), 2) == 0
    waits: list[Callable[[], int]] = [
        lambda: int(cudart.cudaStreamSynchronize(stream)),
        lambda: int(cudart.cudaEventSynchronize(event)),
        lambda: int(cudart.cudaDeviceSynchronize()),
    ]
    for wait in waits:
        mark = journal.mark()
        assert cudart.cudaMemcpyAsync(pointer, source, size, TO_DEVICE, stream) == 0
        assert cudart.cudaMemcpyAsync(target, pointer, size, TO_HOST, stream) == 0
        assert cudart.cudaEventRecord(event, stream) == 0
        assert target.raw != source.raw
        assert wait() == 0
        assert target.raw == source.raw and journal.since(mark).faults == []
    assert cudart.cudaMemcpyAsync(pointer, source, size, TO_DEVICE, stream) == 0
    source.raw = b"c" * 64
    assert cudart.cudaStreamSynchronize(stream) == 0
    assert len(journal.since(mark).faults) == 1
    for host in (source, target):
        assert cudart.cudaHostUnregister(host) == 0
    assert cudart.cudaEventDestroy(event) == cudart.cudaFree(pointer) == 0


def test_pinned_memory_is_told_from_pageable(cudart: Any, stream: Any, journal: Journal) -> None:
    pointer, pinned, registered = memory(cudart), ctypes.c_void_p(), ctypes.create_string_buffer(8192)
    assert cudart.cudaMallocHost(ctypes.byref(pinned), ctypes.c_size_t(4096)) == 0
    assert cudart.cudaHostRegister(registered, ctypes.c_size_t(8192), 0) == 0
    mark, size = journal.mark(), ctypes.c_size_t(16)
    for host in (pinned, ctypes.byref(registered, 8000), ctypes.create_string_buffer(16)):
        assert cudart.cudaMemcpyAsync(pointer, host, size, TO_DEVICE, stream) == 0
    assert [copy["host"] for copy in journal.since(mark).of("copy")] == ["pinned", "pinned", "pageable"]
    assert cudart.cudaHostUnregister(registered) == 0
    assert cudart.cudaFreeHost(pinned) == 0 and cudart.cudaFree(pointer) == 0


def test_memory_is_counted_and_ends(cudart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def free() -> int:
        found, total = ctypes.c_size_t(), ctypes.c_size_t()
        assert cudart.cudaMemGetInfo(ctypes.byref(found), ctypes.byref(total)) == 0
        return found.value

    before = free()
    pointer = memory(cudart, 1 << 20)
    assert before - free() == 1 << 20
    assert cudart.cudaFree(pointer) == 0 and free() == before
    monkeypatch.setenv("STAND_IN_MEMORY_MIB", "16384")
    assert cudart.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(17 << 30)) == OUT_OF_MEMORY
    assert cudart.cudaGetLastError() == OUT_OF_MEMORY and cudart.cudaGetLastError() == 0


def test_events_tell_the_time_between_them(cudart: Any, stream: Any) -> None:
    events = [ctypes.c_void_p() for _ in range(3)]
    for event in events:
        assert cudart.cudaEventCreate(ctypes.byref(event)) == 0
        assert cudart.cudaEventRecord(event, stream) == 0
        assert cudart.cudaEventSynchronize(event) == 0
    times = [ctypes.c_float() for _ in range(2)]
    for time, event in zip(times, events[1:], strict=True):
        assert cudart.cudaEventElapsedTime(ctypes.byref(time), events[0], event) == 0
    assert 0 < times[0].value < times[1].value
    for event in events:
        assert cudart.cudaEventDestroy(event) == 0
