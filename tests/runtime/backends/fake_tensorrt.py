"""Stand-ins for cuda.bindings.runtime, tensorrt and tensorrt_rtx, to run a session without a GPU.

They compute next to nothing (a row's output is the sum of the row) and check what a session does with memory, streams
and captures: each use of a pointer must be to live memory of the right kind and size, both when work is enqueued and
when it runs. Work runs when its stream is waited for, so that memory that is reused too early shows in the results.
What is wrong is collected in `Device.faults`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jinaclip.backends.shapes import Profile
from jinaclip.backends.tensorrt import library as tensorrt_library

OUT_OF_MEMORY, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 2, 900, 901
PAD, SPOILT = 1, 666  # token ids: of padding; a text with the other is not finite
WIDTH = 3  # of an output vector
Work = Callable[[bool], None]  # checks the memory that it uses, and unless the argument is True (check only), uses it
_NOT_WHILE_CAPTURING = ("cudaMalloc", "cudaFree", "cudaMallocHost", "cudaFreeHost", "cudaStreamSynchronize")


def holds(profile: Profile, rows: int, tokens: int | None) -> bool:
    """Whether a shape is within a profile."""
    inside = profile.batch[0] <= rows <= profile.batch[2]
    limits = profile.tokens
    return inside and (limits is None or (tokens is not None and limits[0] <= tokens <= limits[2]))


@dataclass
class Block:
    """A piece of memory."""

    kind: str  # "device" or "pinned"
    array: np.ndarray
    live: bool = True


@dataclass
class FakeStream:
    """Work that was enqueued and has not run; while it is captured, the work that was captured."""

    pending: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    thread: int = 0  # that captures
    valid: bool = True
    waiting: bool = False


class Device:
    """The functions of cuda.bindings.runtime that jinaclip.backends.cuda.api calls, and what they act on.

    Attributes:
        faults: what was done wrong, in words.
        calls: how often each function was called.
        fail: by the name of a function, whether this call of it fails. "execute" and "address" stand for TensorRT's
            execute_async_v3 and set_tensor_address, "context" for create_execution_context.
        delay_s: that each wait for a stream takes.
    """

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, Callable[[], bool]] = {}
        self.delay_s = 0.0
        self.blocks: dict[int, Block] = {}  # also freed ones, so that no address comes twice
        self.streams: dict[int, FakeStream] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._handle = 1 << 40

    def live(self) -> list[str]:
        """What has not been freed."""
        blocks = [block.kind for block in self.blocks.values() if block.live]
        return [*blocks, *("stream" for _ in self.streams), *("graph" for _ in self.graphs), *map(str, self.contexts)]

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, {OUT_OF_MEMORY: b"out of memory"}.get(error, b"capture failed")

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (self._begin("cudaSetDevice", OUT_OF_MEMORY),)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, 1 << 20, 1 << 30

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        return self._allocate("cudaMalloc", "device", size)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        return self._allocate("cudaMallocHost", "pinned", size)

    def cudaFree(self, pointer: int) -> tuple[int]:
        return self._release("cudaFree", "device", pointer)

    def cudaFreeHost(self, pointer: int) -> tuple[int]:
        return self._release("cudaFreeHost", "pinned", pointer)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        error = self._begin("cudaStreamCreateWithFlags", OUT_OF_MEMORY)
        return error, 0 if error else self._new(self.streams, FakeStream())

    def cudaStreamDestroy(self, handle: int) -> tuple[int]:
        with self._lock:
            if self.streams.pop(handle).pending:
                self.faults.append("a stream was destroyed before its work had run")
        return (0,)

    def cudaStreamSynchronize(self, handle: int) -> tuple[int]:
        if error := self._begin("cudaStreamSynchronize", OUT_OF_MEMORY):
            return (error,)
        stream = self.streams[handle]
        if stream.waiting:
            self.faults.append("two threads use one stream")
        stream.waiting = True
        time.sleep(self.delay_s)
        with self._lock:
            for work in stream.pending:
                work(False)
            stream.pending.clear()
        stream.waiting = False
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, handle: int) -> tuple[int]:
        error = self._begin("cudaMemcpyAsync", CAPTURE_INVALIDATED)
        kinds = ("device", "pinned") if kind == "up" else ("pinned", "device")

        def copy(check_only: bool) -> None:
            into, of = (self.block(p, k, size, "a copy") for p, k in zip((target, source), kinds, strict=True))
            if not check_only:
                into[:size] = of[:size]

        if not error:
            self.enqueue(handle, copy)
        return (error,)

    def cudaStreamBeginCapture(self, handle: int, mode: int) -> tuple[int]:
        error = self._begin("cudaStreamBeginCapture", CAPTURE_UNSUPPORTED)
        stream = self.streams[handle]
        if not error:
            if stream.captured is not None or stream.pending:
                self.faults.append("a capture began while the stream was captured or had work")
            stream.captured, stream.thread, stream.valid = [], threading.get_ident(), True
        return (error,)

    def cudaStreamEndCapture(self, handle: int) -> tuple[int, int]:
        error, stream = self._begin("cudaStreamEndCapture", CAPTURE_INVALIDATED), self.streams[handle]
        work, stream.captured = stream.captured, None
        if work is None:
            self.faults.append("a capture ended that had not begun")
        if error or work is None or not stream.valid:
            return CAPTURE_INVALIDATED, 0
        return 0, self._new(self.graphs, work)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        error = self._begin("cudaGraphInstantiate", OUT_OF_MEMORY)
        return error, 0 if error else self._new(self.graphs, self.graphs[graph])

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        return (0 if self.graphs.pop(graph, None) is not None else OUT_OF_MEMORY,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: int, handle: int) -> tuple[int]:
        if not (error := self._begin("cudaGraphLaunch", OUT_OF_MEMORY)):
            for work in self.graphs[graph]:
                self.enqueue(handle, work)
        return (error,)

    def enqueue(self, handle: int, work: Work) -> None:
        """Work for a stream."""
        with self._lock:
            work(True)
            stream = self.streams[handle]
            (stream.pending if stream.captured is None else stream.captured).append(work)

    def block(self, pointer: int, kind: str, size: int, user: str) -> np.ndarray:
        """Memory that is about to be used."""
        block = self.blocks.get(pointer)
        if block is None or not block.live or block.kind != kind or len(block.array) < size:
            state = "unknown" if block is None else f"{block.kind} of {len(block.array)} bytes, live: {block.live}"
            self.faults.append(f"{user} used {kind} memory for {size} bytes at {pointer}, which is {state}")
            return np.zeros(size, np.uint8)
        return block.array

    def fails(self, name: str) -> bool:
        """Whether this call is to fail."""
        with self._lock:
            self.calls[name] += 1
            return name in self.fail and self.fail[name]()

    def _begin(self, name: str, error: int) -> int:
        """The error of a call, or 0."""
        here = threading.get_ident()
        capturing = [s for s in list(self.streams.values()) if s.captured is not None and s.thread == here]
        if name in _NOT_WHILE_CAPTURING and capturing:
            self.faults.append(f"{name} was called while its thread captured")
            capturing[0].valid = False
            return CAPTURE_UNSUPPORTED
        return error if self.fails(name) else 0

    def _new(self, into: dict[int, Any], thing: Any) -> int:
        with self._lock:
            self._handle += 256
            into[self._handle] = thing
            return self._handle

    def _allocate(self, name: str, kind: str, size: int) -> tuple[int, int]:
        if error := self._begin(name, OUT_OF_MEMORY):
            return error, 0
        block = Block(kind, np.full(size, 0xAB, np.uint8))
        if kind == "device":
            return 0, self._new(self.blocks, block)
        self.blocks[block.array.ctypes.data] = block
        return 0, block.array.ctypes.data

    def _release(self, name: str, kind: str, pointer: int) -> tuple[int]:
        if error := self._begin(name, OUT_OF_MEMORY):
            return (error,)
        self.block(pointer, kind, 0, name)[:] = 0xDD
        self.blocks[pointer].live = False
        return (0,)


class FakeContext:
    """An execution context."""

    def __init__(self, engine: FakeEngine, cache: FakeRuntimeCache | None) -> None:
        self._engine, self._cache, self._device = engine, cache, engine.device
        self._profile: int | None = None
        self._memory: tuple[int, int] | None = None
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()
        self._device.contexts.add(self)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if self._memory is not None:
            self._device.faults.append("a profile was set after the memory for it")
        self._profile = profile
        self._device.enqueue(stream, lambda check_only: None)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if self._profile is None or size < self._engine.device_memory_size_v2:
            self._device.faults.append("memory was set before the profile, or less than the engine asks for")
        self._memory = memory, size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine.tensors and not self._device.fails("address")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        profile = self._engine.profiles[self._profile]
        self._shape = shape
        return holds(profile, shape[0], shape[1] if profile.tokens else None)

    def execute_async_v3(self, stream: int) -> bool:
        if self._device.fails("execute"):
            return False
        if self._cache is not None and (key := str([self._profile, *self._shape])) not in self._cache.kernels:
            self._cache.kernels.append(key)
            self._engine.compiled.append(key)
        self._device.enqueue(stream, partial(_run, weakref.ref(self), self._device, self._shape))
        return True


def _run(found: weakref.ref[FakeContext], device: Device, shape: tuple[int, ...], check_only: bool) -> None:
    """Sums the rows, and checks what a kernel would touch."""
    context = found()
    if context is None or context._memory is None:
        device.faults.append("a run of a context that is gone, or has no memory")
        return
    if context._shape != shape:
        device.faults.append(f"a run of shape {shape} after the context was set to {context._shape}")
    device.block(*(context._memory[0], "device", context._memory[1]), user="a run")
    arrays = {}
    for name, (dtype, row) in context._engine.tensors.items():
        full = (shape[0], *(shape[1:] if name == context._engine.source else row))
        size = int(np.prod(full)) * dtype.itemsize
        memory = device.block(context._addresses.get(name, 0), "device", size, f"a run, for {name},")
        arrays[name] = memory[:size].view(dtype).reshape(full)
    if not check_only:
        source = arrays.pop(context._engine.source).astype(np.int64).reshape(shape[0], -1)
        for array in arrays.values():
            if array.dtype == bool:
                array[:] = (source != SPOILT).all(1)
            else:
                array[:] = np.where(source == PAD, 0, source).sum(1)[:, None]


class FakeRuntimeCache:
    """What TensorRT-RTX has compiled."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def serialize(self) -> bytes:
        return json.dumps(self.kernels).encode()

    def deserialize(self, blob: bytes) -> bool:
        if blob.startswith(b"["):
            self.kernels = json.loads(blob)
        return blob.startswith(b"[")


class FakeEngine:
    """A plan that `write_plan` wrote."""

    def __init__(self, device: Device, compiled: list[str], plan: bytes) -> None:
        facts = json.loads(plan)
        self.device, self.compiled = device, compiled
        self.profiles = [Profile.from_json(entry) for entry in facts["profiles"]]
        self.num_optimization_profiles = len(self.profiles)
        self.device_memory_size_v2 = 16 * max(profile.corner for profile in self.profiles)
        self.source = "input_ids" if self.profiles[0].tokens else "pixel_values"
        outputs = {"vectors": (np.dtype(np.float32), (WIDTH,)), "all_finite": (np.dtype(bool), ())}
        self.tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            self.source: (np.dtype(np.int32), (-1,)) if self.profiles[0].tokens else (np.dtype(np.uint8), (4, 4, 3)),
            **outputs,
        }
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
        return self.tensors[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.tensors[name][1])

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == self.source else "OUTPUT"

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(cache=None, set_execution_context_allocation_strategy=lambda strategy: None)
        config.create_runtime_cache = FakeRuntimeCache
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        return config

    def create_execution_context(self, settings: Any) -> FakeContext | None:
        cache = None if settings == "USER_MANAGED" else settings.cache
        return None if self.device.fails("context") else FakeContext(self, cache)


def write_plan(path: Path, profiles: tuple[Profile, ...]) -> Path:
    """A plan that the stand-ins load."""
    path.write_text(json.dumps({"profiles": [profile.to_json() for profile in profiles]}), "utf-8")
    return path


def install(patch: pytest.MonkeyPatch, backend: str, *, logger_delay_s: float = 0.0) -> tuple[Device, list[str]]:
    """Put the stand-ins in the place of the real modules. Returns what the session acts on, and the shapes that
    TensorRT-RTX compiles, as they come.
    """
    device, compiled = Device(), list[str]()

    class ILogger:
        made = 0

        def __init__(self) -> None:
            time.sleep(logger_delay_s)
            type(self).made += 1

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: np.ndarray) -> FakeEngine | None:
            content = bytes(plan)
            return FakeEngine(device, compiled, content) if content.startswith(b"{") else None

    module: Any = ModuleType(backend.replace("-", "_"))
    module.__version__ = "1.7.1" if backend == "tensorrt-rtx" else "11.4.0"
    module.ILogger, module.Runtime, module.nptype = ILogger, Runtime, lambda dtype: dtype
    module.TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
    if backend == "tensorrt-rtx":
        module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="EAGER")
        module.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = device
    patch.setitem(sys.modules, module.__name__, module)
    patch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    patch.setitem(sys.modules, "cuda.bindings", bindings)
    patch.setattr(tensorrt_library, "_loggers", {})
    return device, compiled
