"""A session over a TensorRT or TensorRT-RTX plan: contexts on memory of its own, padded shapes, CUDA graphs.

What runs here is a plan that `jinaclip build` made for this GPU (jinaclip.plans). Batches are padded to a bucket
(jinaclip.buckets). A bucket that comes a second time is captured as a CUDA graph, copies included, and from then on it
costs one launch; it gets a context of its own, for a context that has since run another shape may hold other values
where the graph reads. Each worker has a stream, staging, and one piece of memory for the activations of all its
contexts, which never run at the same time; so the copies of one worker overlap with the work of another.
"""

from __future__ import annotations

import os
import queue
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.buckets import Bucket, Profile, bucket_for, most_rows, pad_into
from jinaclip.cuda import Cuda, DeviceMemory, Graph, PinnedArray, Stream
from jinaclip.errors import BackendError, EngineMismatch, InputError
from jinaclip.gpu import Gpu
from jinaclip.packing import GPU_COST
from jinaclip.sessions import Arrays, available_threads, keep_after_fork, require_open
from jinaclip.tensorrt_library import Library, Messages, logger_of

FINITE = "all_finite"  # output of the graph: whether a row's vector has no NaN or infinity
MOST_GRAPHS = 64  # captured for each worker
WORKERS = 2


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: np.dtype[Any]
    row: tuple[int, ...]  # shape without the batch; -1 for tokens


class TensorRTSession:
    """A plan on one GPU. Safe to call from several threads at once.

    Args:
        plan: the file. It is code: only one that `jinaclip build` wrote, with its sha256 checked.
        gpu: that it was built for, and that is there (jinaclip.gpu.gpu): without a driver TensorRT must not be touched.
        library: that built it.
        profiles: of the plan, in its order.
        key: of the engine, for `describe`.
        pad: token id that fills the rest of a row.
        workers: runs at the same time; each takes memory for activations.
        cache: where TensorRT-RTX keeps the kernels that it compiles for this GPU; None for nowhere.

    Raises:
        EngineMismatch: the library refuses the plan.
        BackendError: CUDA or TensorRT fail; there is too little memory.
    """

    tiled_above: int | None = 0  # attention never writes its scores
    cost = GPU_COST

    def __init__(
        self, plan: Path, *, gpu: Gpu, library: Library, profiles: Sequence[Profile], key: str, pad: int = 0,
        workers: int = WORKERS, cache: Path | None = None,
    ) -> None:  # fmt: skip
        self.backend, self.device, self.threads = library.backend, f"cuda:{gpu.index}", available_threads()
        self.concurrency = workers
        self.profiles, self.pad = tuple(profiles), pad
        self._gpu, self._library, self.key = gpu, library, key
        self._process = os.getpid()
        keep_after_fork(self)
        self._cuda = Cuda(gpu.index)
        self._cache = cache if library.backend == "tensorrt-rtx" else None
        trt = library.module
        with Messages(library) as messages:
            self._runtime = trt.Runtime(logger_of(library))
            self._engine = self._runtime.deserialize_cuda_engine(np.memmap(plan, np.uint8, "r"))
            if self._engine is None:
                raise EngineMismatch(
                    f"{library.backend} {library.version} on {gpu} refuses {plan.parent.name}: {messages.errors()}; "
                    f"build it again here: jinaclip build BUNDLE --backend {library.backend} --force"
                )
            if self._engine.num_optimization_profiles != len(self.profiles):
                raise EngineMismatch(
                    f"{plan.parent.name} has {self._engine.num_optimization_profiles} profiles, its sidecar says "
                    f"{len(self.profiles)}; build it again"
                )
            self._inputs, self._outputs = self._tensors(trt)
            self._runtime_cache: Any = None
            self._workers: queue.LifoQueue[_Worker] = queue.LifoQueue()
            self._all: list[_Worker] = []
            try:
                for _ in range(workers):
                    self._all.append(_Worker(self, self._cuda))
                    self._workers.put(self._all[-1])
            except BaseException:
                self._free()
                raise

    def run(
        self, inputs: Arrays, *, interruptible: bool = False, release_memory: bool = False
    ) -> dict[str, np.ndarray]:
        """All outputs by name; a batch that is larger than a profile's runs in parts."""
        require_open(self._process, self._engine)
        (name, batch), *others = inputs.items()
        source = self._inputs
        if others or name != source.name:
            raise InputError(f"the engine's input is {source.name}, found {', '.join(inputs)}")
        tokens = batch.shape[1] if source.row == (-1,) else None
        if tokens is None and tuple(batch.shape[1:]) != source.row:
            raise InputError(f"{name} has rows of shape {list(batch.shape[1:])}, expected {list(source.row)}")
        most = most_rows(tokens, self.profiles)
        if most == 0:
            longest = max(profile.tokens[2] for profile in self.profiles if profile.tokens)
            raise InputError(
                f"a text has {tokens} tokens, this engine was built for at most {longest}; give max_length={longest}, "
                "or build one with a longer profile (jinaclip build --profile)"
            )
        parts = []
        for start in range(0, len(batch), most):
            worker = self._workers.get()
            try:
                parts.append(worker.run(np.ascontiguousarray(batch[start : start + most])))
            finally:
                self._workers.put(worker)
        found = {tensor.name: np.concatenate([part[tensor.name] for part in parts]) for tensor in self._outputs}
        finite = found.pop(FINITE, None)
        if finite is not None and not finite.all():
            row = int(np.flatnonzero(~finite.astype(bool))[0])
            raise BackendError(
                f"row {row} of the batch came out as NaN or infinity from {self.key} on {self._gpu.name}; "
                "the engine is not to be trusted with this checkpoint: certify it, or use another precision"
            )
        return found

    def describe(self) -> dict[str, Any]:
        return tensorrt_facts(self._library, self._gpu) | {
            "device_index": self._gpu.index,
            "threads": self.threads,
            "prepared": self.key,
            "profiles": [profile.name for profile in self.profiles],
            "workers": self.concurrency,
        }

    def close(self) -> None:
        if os.getpid() == self._process and self._engine is not None:
            self._save_cache()
            self._free()

    def graphs(self) -> int:
        """CUDA graphs that are held now."""
        return sum(len(worker.graphs) for worker in self._all)

    def _free(self) -> None:
        for worker in self._all:
            worker.close()
        self._all = []
        self._runtime_cache = None
        self._engine = None
        self._runtime = None

    def _tensors(self, trt: Any) -> tuple[_Tensor, list[_Tensor]]:
        inputs: list[_Tensor] = []
        outputs: list[_Tensor] = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            tensor = _Tensor(name, dtype, tuple(self._engine.get_tensor_shape(name))[1:])
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (inputs if is_input else outputs).append(tensor)
        return inputs[0], outputs

    def _context(self) -> Any:
        """A context on memory that its worker gives it."""
        trt = self._library.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.backend != "tensorrt-rtx":
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # Kernels for the exact shape, compiled at its first run; the library captures and replays it by itself.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._runtime_cache is None:
            self._runtime_cache = config.create_runtime_cache()
            if self._cache is not None and self._cache.is_file():
                self._runtime_cache.deserialize(self._cache.read_bytes())  # refuses another GPU's by itself
        config.set_runtime_cache(self._runtime_cache)
        return self._engine.create_execution_context(config)

    def _save_cache(self) -> None:
        if self._cache is not None and self._runtime_cache is not None:
            with suppress(OSError):
                content = bytes(memoryview(self._runtime_cache.serialize()))
                if content:
                    temporary = self._cache.with_name(f".{self._cache.name}.{os.getpid()}")
                    temporary.write_bytes(content)
                    temporary.replace(self._cache)


@dataclass
class _Captured:
    """A bucket's graph, and the context that it was captured with and must outlive it."""

    context: Any
    graph: Graph


class _Worker:
    """A stream, staging, memory for activations, a context for every profile, and the graphs captured so far."""

    def __init__(self, session: TensorRTSession, cuda: Cuda) -> None:
        self._session, self._cuda = session, cuda
        self.graphs: OrderedDict[Bucket, _Captured] = OrderedDict()
        self._seen: set[Bucket] = set()
        self._held: list[Any] = []  # to be closed
        self._contexts: list[Any] = []
        self.stream = self._hold(Stream(cuda))
        try:
            self._allocate(cuda)
        except BaseException:
            self.close()
            raise

    def _allocate(self, cuda: Cuda) -> None:
        session = self._session
        engine, profiles, source = session._engine, session.profiles, session._inputs
        size = max(_bytes(source, profile.batch[2], profile.tokens and profile.tokens[2]) for profile in profiles)
        self._input, self._input_host = self._hold(DeviceMemory(cuda, size)), self._hold(PinnedArray(cuda, size))
        rows = max(profile.batch[2] for profile in profiles)
        self._output = {t.name: self._hold(DeviceMemory(cuda, _bytes(t, rows, None))) for t in session._outputs}
        self._output_host = {t.name: self._hold(PinnedArray(cuda, _bytes(t, rows, None))) for t in session._outputs}
        self._sizes = [int(engine.get_device_memory_size_for_profile_v2(index)) for index in range(len(profiles))]
        self._activations = self._hold(DeviceMemory(cuda, max(self._sizes)))
        self._contexts = [self._context(index) for index in range(len(profiles))]

    def _context(self, profile: int) -> Any:
        """A context for one profile, on this worker's memory."""
        session = self._session
        context = session._context()
        if context is None:
            raise BackendError(f"{session.backend} makes no context for profile {session.profiles[profile].name}")
        context.set_device_memory(self._activations.pointer, self._sizes[profile])
        if not context.set_optimization_profile_async(profile, int(self.stream.handle)):
            raise BackendError(f"{session.backend} does not take profile {session.profiles[profile].name}")
        context.set_tensor_address(session._inputs.name, self._input.pointer)
        for tensor in session._outputs:
            context.set_tensor_address(tensor.name, self._output[tensor.name].pointer)
        self.stream.wait()
        return context

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """One batch that a profile holds."""
        self._cuda.enter()  # this may be another thread than the last time
        session = self._session
        source = session._inputs
        rows = len(batch)
        tokens = batch.shape[1] if source.row == (-1,) else None
        bucket = bucket_for(rows, tokens, session.profiles)
        assert bucket is not None  # `most_rows` looked
        shape = (bucket.rows, *(source.row if bucket.tokens is None else (bucket.tokens,)))
        pad_into(self._input_host.view(shape, source.dtype), batch, session.pad)
        self._launch(bucket, shape)
        self.stream.wait()
        return {
            tensor.name: self._output_host[tensor.name].view((bucket.rows, *tensor.row), tensor.dtype)[:rows].copy()
            for tensor in session._outputs
        }

    def _launch(self, bucket: Bucket, shape: tuple[int, ...]) -> None:
        """Copy in, run, copy out: plainly at first, as a captured graph from the third time on."""
        captured = self.graphs.get(bucket)
        if captured is not None:
            self.graphs.move_to_end(bucket)
            captured.graph.launch(self.stream)
            return
        again = bucket in self._seen and self._session.backend != "tensorrt-rtx"  # which captures by itself
        context = self._context(bucket.profile) if again else self._contexts[bucket.profile]
        if not context.set_input_shape(self._session._inputs.name, shape):
            raise BackendError(f"the engine does not take the shape {list(shape)}")

        def work() -> None:
            self.stream.upload(self._input, self._input_host, _bytes(self._session._inputs, bucket.rows, bucket.tokens))
            with Messages(self._session._library) as messages:
                if not context.execute_async_v3(int(self.stream.handle)):
                    raise BackendError(f"the engine failed to run: {messages.errors()}")
            for tensor in self._session._outputs:
                size = _bytes(tensor, bucket.rows, None)
                self.stream.download(self._output_host[tensor.name], self._output[tensor.name], size)

        work()
        self._seen.add(bucket)
        if again:
            self.stream.wait()  # a context settles in its first run, which may not be captured
            self.graphs[bucket] = _Captured(context, self.stream.capture(work))
            while len(self.graphs) > MOST_GRAPHS:
                self.graphs.popitem(last=False)[1].graph.close()

    def _hold(self, thing: Any) -> Any:
        self._held.append(thing)
        return thing

    def close(self) -> None:
        with suppress(BackendError):
            self._cuda.enter()
            self.stream.wait()
        for captured in self.graphs.values():
            captured.graph.close()
        self.graphs.clear()
        self._contexts = []
        for thing in reversed(self._held):
            thing.close()
        self._held = []


def tensorrt_facts(library: Library, gpu: Gpu) -> dict[str, Any]:
    """What decides an engine's numbers, known before one is opened: part of every `describe()`."""
    return {
        "backend": library.backend,
        "version": library.version,
        "device": "cuda",
        "gpu": str(gpu),
        "driver": gpu.driver,
    }


def _bytes(tensor: _Tensor, rows: int, tokens: int | None) -> int:
    """Of a tensor with so many rows."""
    row: Sequence[int] = (tokens or 1,) if tensor.row == (-1,) else tensor.row
    return int(rows * np.prod(row, dtype=np.int64)) * tensor.dtype.itemsize
