"""ONNX Runtime sessions on a GPU, with the CUDA provider only.

A run copies its inputs from pinned memory to the GPU, launches the graph and copies the outputs back, in one stream. It
waits only for the end. Two runs can be in the stream at the same time, so that the GPU does not wait for the host
between them.

Batches are padded to a small set of shapes. When a shape is used a second time, it is captured as a CUDA graph. A CUDA
graph needs one launch instead of hundreds, and the calling thread launches it. Once a session has its maximum number of
graphs, other shapes run without one.

Everything except captured graphs runs in one thread per GPU (backends/cuda/gpu_thread.py), because ONNX Runtime keeps
memory and library handles for every thread that uses it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.backends.base import Arrays, Names, gpu_facts, keep_after_fork, require_open
from jinaclip.backends.cuda.api import Cuda, Graph, Stream
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.cuda.gpu_thread import Answer, gpu_thread
from jinaclip.backends.cuda.libraries import load_libraries
from jinaclip.backends.cuda.runtime import CudaRuntime
from jinaclip.backends.cuda.staging import Block, Slot
from jinaclip.backends.machine import available_threads
from jinaclip.backends.onnxruntime.cuda_placement import require_usable_placement
from jinaclip.backends.onnxruntime.cuda_provider import PROVIDER, cuda_major, cuda_problem
from jinaclip.backends.onnxruntime.cuda_runs import Key, Run, RunPlanner
from jinaclip.backends.onnxruntime.library import first_line, import_onnxruntime, session_options
from jinaclip.backends.pool import Loan, Pool
from jinaclip.errors import BackendError, BackendMissing, BundleError

logger = logging.getLogger("jinaclip")

# CUDA graphs of a session: of small shapes (see cuda_runs.py), and of larger ones.
MOST_SMALL_GRAPHS, MOST_LARGE_GRAPHS = 64, 32
MOST_SHAPES_SEEN = 4096  # number of shapes that are remembered; further shapes are not captured
RUNS_AT_ONCE = 2
# Parts of CUDA's and onnxruntime's messages, in lower case.
_OUT_OF_MEMORY = ("out of memory", "failed to allocate memory", "cudaerrormemoryallocation", "alloc_failed")


class OnnxRuntimeCudaSession:
    """An ONNX Runtime session on one GPU. Safe to call from several threads at once.

    Args:
        path: the .onnx file. Its weights are in the same directory.
        gpu: the GPU, from `gpu()`.
        prepared: key of the prepared graph. None for the bundle's graph.
        pad: token id that fills the rest of a row.
        graphs: capture CUDA graphs.
        operators: the library of jinaclip's own operators, if the graph uses them.

    Raises:
        BackendMissing: onnxruntime has no usable CUDA provider, or the graph needs cuDNN and it is not found.
        BundleError: onnxruntime cannot open the file.
        BackendError: onnxruntime would run part of the graph on the CPU, or the GPU has too little memory.
    """

    backend = "onnxruntime"
    concurrency = RUNS_AT_ONCE

    def __init__(
        self,
        path: Path,
        *,
        gpu: Gpu,
        prepared: str | None = None,
        pad: int = 0,
        graphs: bool = True,
        operators: Path | None = None,
    ) -> None:
        if problem := cuda_problem(gpu):
            raise BackendMissing(f"device cuda:{gpu.index}: {problem}")
        self.device, self.threads, self.prepared = f"cuda:{gpu.index}", available_threads(), prepared
        self._gpu, self._pad, self._path, self._operators = gpu, pad, path, operators
        self._process = os.getpid()
        keep_after_fork(self)
        self._thread = gpu_thread(gpu.index)
        self._closing = threading.RLock()
        self._closed = False
        self._session: Any = None
        self._slots: list[Slot] = []
        self._captures = graphs
        self._graphs: dict[Key, Graph] = {}
        self._seen: set[Key] = set()  # shapes that have run, captured or not
        self._plain: set[Key] = set()  # shapes whose capture failed
        self._held = {True: 0, False: 0}  # captures of small shapes (True) and of larger ones, failed ones included
        self._in_stream = threading.Lock()  # held by the thread that adds work to the stream
        self._thread.call(self._open)

    def run(
        self, inputs: Arrays, *, outputs: Names = None, interruptible: bool = False, release_memory: bool = False
    ) -> dict[str, np.ndarray]:
        self._require_open()
        planner = self._planner
        if set(inputs) != {planner.input}:
            raise BackendError(f"the graph's input is {planner.input}, found {', '.join(inputs)}")
        batch = planner.checked(inputs[planner.input])
        if len(batch) == 0:
            return {name: np.empty((0, planner.outputs[name]), np.float32) for name in outputs or planner.outputs}
        work = planner.plan(batch, tuple(outputs or planner.outputs))
        with self._pool.borrow() as loan:
            slot = require_open(self._process, loan.item)  # another thread may have closed the session meanwhile
            try:
                self._make_ready(slot, work)
                work.write(work.inputs.views(slot.input.memory))
                found = self._replay(slot, work) if work.key in self._graphs else None
            except BackendError as error:
                raise self._failed(error) from error
            if found is not None:
                return found
            # The GPU's thread takes over the loan. If this thread is interrupted before that, nothing is run.
            return self._thread.call(self._start, loan, work, release_memory).result()

    def describe(self) -> dict[str, Any]:
        self._require_open()
        return gpu_facts(self.backend, self._ort.__version__, self._gpu) | {
            "device_index": self._gpu.index,
            "threads": self.threads,
            "providers": self._session.get_providers(),
            "prepared": self.prepared,
            "cuda_graphs": self._captures,
            "packed": self._planner.packed,
            "operators": None if self._operators is None else self._operators.name,
        }

    def close(self) -> None:
        """Wait for current runs to end and free the session. Runs that have not started raise "this model is closed".

        Raises:
            BackendError: the calling thread is in a run itself, which a signal handler interrupted.
        """
        if os.getpid() != self._process:
            return
        with self._closing:
            if self._closed and self._stream.handle is None:
                return
            self._pool.close()
            self._closed = True
            with suppress(BackendError):  # raised while Python shuts down; the process then frees everything
                self._thread.call(self._free)

    def __del__(self) -> None:
        with suppress(Exception):  # __init__ may have failed
            if os.getpid() == self._process and not self._closed:
                self._thread.submit(self._free)  # without waiting, because this can be the GPU's thread

    def graphs(self) -> int:
        """Current number of captured CUDA graphs."""
        return len(self._graphs)

    def _require_open(self) -> None:
        require_open(self._process, None if self._closed else self._session)

    def _make_ready(self, slot: Slot, work: Run) -> None:
        """Reserve memory for a run in an idle slot."""
        self._cuda.enter()
        if slot.in_flight:  # the previous run failed or was interrupted
            with self._in_stream:  # waiting for a stream during a capture is an error
                self._stream.wait()
            slot.in_flight = False
        slot.input.reserve(work.inputs.copied)
        slot.output.reserve(work.outputs.size)

    def _replay(self, slot: Slot, work: Run) -> dict[str, np.ndarray] | None:
        """Launch a captured graph from the calling thread. None if the graph was dropped meanwhile."""
        with self._in_stream:
            graph = self._graphs.get(work.key)
            if graph is None:
                return None
            self._put(slot, work, lambda: graph.launch(self._stream))
        return self._results(slot, work)

    def _put(self, slot: Slot, work: Run, launch: Callable[[], object]) -> None:
        """Copy the inputs, launch, copy the outputs and record the slot's event, without waiting."""
        slot.in_flight = True
        self._stream.upload(self._input_block.memory, slot.input.memory, work.inputs.copied)
        launch()
        begin, end = work.copied_back()
        self._stream.download(slot.output.memory, self._output_block.memory, end - begin, begin)
        slot.done.record(self._stream)

    def _results(self, slot: Slot, work: Run) -> dict[str, np.ndarray]:
        slot.done.wait()
        slot.in_flight = False
        views = work.outputs.views(slot.output.memory)
        return {name: views[name][: work.rows].copy() for name in work.wanted}

    # The methods below run in the GPU's thread.

    def _open(self) -> None:
        ort = self._ort = import_onnxruntime()
        self._cuda = Cuda(self._gpu.index, CudaRuntime(load_libraries(cuda_major(ort))))
        self._stream = Stream(self._cuda)
        # Inputs and outputs of all runs, graphs included. The stream executes them one after the other, so they share
        # these two blocks.
        self._input_block, self._output_block = (Block.on_device(self._cuda) for _ in range(2))
        try:
            # At its default level, the library's global logger writes errors to stderr that are also raised, and a
            # warning for each session. The session's own log level does not affect this logger.
            ort.set_default_logger_severity(4)
            self._session = self._inference_session(ort)
            require_usable_placement(self._session, self._path)
            self._planner = RunPlanner(self._session, self._pad)
            self.cost = self._planner.cost
            for _ in range(RUNS_AT_ONCE):
                self._slots.append(Slot(self._cuda))
            self._pool = Pool(self._slots)
        except BaseException:
            self._free()
            raise
        finally:
            ort.set_default_logger_severity(2)

    def _inference_session(self, ort: Any) -> Any:
        options = session_options(ort)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # Weights are allocated outside the arena, and the arena grows by the requested size instead of doubling.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if self._operators is not None:
            options.register_custom_ops_library(str(self._operators))
        provider = {
            "device_id": self._gpu.index,
            "use_tf32": 0,  # on by default; it rounds float32 operands to 10 bits
            "user_compute_stream": str(self._stream.pointer),
            "arena_extend_strategy": "kSameAsRequested",
        }
        try:
            session = ort.InferenceSession(
                str(self._path), options, providers=[(PROVIDER, provider), "CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:
            if _is_out_of_memory(error):
                raise self._out_of_memory(error) from error
            raise BundleError(
                f"onnxruntime {ort.__version__} cannot open {self._path} on {self._gpu}: {first_line(error)}; "
                "check the bundle with `jinaclip verify`, or export it again"
            ) from error
        if session.get_providers()[0] != PROVIDER:
            raise BackendMissing(
                f"onnxruntime {ort.__version__} opened the graph on {session.get_providers()[0]} instead of "
                f"{PROVIDER}, because its CUDA libraries cannot be loaded; run: pip install 'jinaclip[cuda]'"
            )
        return session

    def _start(self, asked: Loan[Slot], work: Run, release_memory: bool) -> Answer[dict[str, np.ndarray]]:
        """Add a run to the stream. The returned Answer waits for the end of the run, and is processed after other work
        that was submitted meanwhile.
        """
        loan = asked.take_over()
        slot = loan.item
        if slot is None:
            raise BackendError("the thread that requested this run was interrupted")
        try:
            with self._in_stream:
                self._reserve(work)
                binding, options = self._binding(work), self._options()
                if release_memory:
                    if self._graphs:
                        raise BackendError("release_memory is not possible: captured CUDA graphs use the memory")
                    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{self._gpu.index}")
                self._put(slot, work, lambda: self._session.run_with_iobinding(binding, options))
            finished = self._thread.submit(self._finish, loan, slot, work)
        except Exception as error:
            loan.give_back()
            raise self._failed(error) from error
        if self._wants_graph(work):
            if work.key in self._seen:
                self._thread.submit(self._capture, work)
            elif len(self._seen) < MOST_SHAPES_SEEN:
                self._seen.add(work.key)
        return finished

    def _finish(self, loan: Loan[Slot], slot: Slot, work: Run) -> dict[str, np.ndarray]:
        try:
            return self._results(slot, work)
        except Exception as error:
            raise self._failed(error) from error
        finally:
            loan.give_back()

    def _wants_graph(self, work: Run) -> bool:
        """Whether a shape should be captured. Captured graphs are not replaced."""
        most = MOST_SMALL_GRAPHS if work.small else MOST_LARGE_GRAPHS
        known = work.key in self._graphs or work.key in self._plain
        return self._captures and not known and self._held[work.small] < most

    def _capture(self, work: Run) -> None:
        """Capture a shape as a CUDA graph, without running it. It must have run before, which allocates its memory."""
        if self._closed or not self._wants_graph(work) or not self._fits(work):
            return
        self._held[work.small] += 1
        try:
            binding, options = self._binding(work), self._options()
            with self._in_stream:
                self._graphs[work.key] = self._stream.capture(
                    lambda: self._session.run_with_iobinding(binding, options), keeps=binding, relaxed=True
                )
        except Exception as error:
            self._plain.add(work.key)
            self._cuda.api.cudaGetLastError()  # resets it, or the next launch would report it
            logger.warning("%s: shape %s runs without a CUDA graph: %s", self.device, list(work.key), first_line(error))

    def _fits(self, work: Run) -> bool:
        """Whether the current blocks are large enough for a run's inputs and outputs."""
        return self._input_block.size >= work.inputs.size and self._output_block.size >= work.outputs.size

    def _reserve(self, work: Run) -> None:
        """Reserve memory for a run's inputs and outputs. If the blocks must be replaced, all graphs are dropped first,
        because they use the addresses of the old blocks. They are captured again later.
        """
        if not self._fits(work):
            self._drop_graphs()
            self._input_block.reserve(work.inputs.size)
            self._output_block.reserve(work.outputs.size)

    def _drop_graphs(self) -> None:
        graphs, self._graphs = self._graphs, {}
        self._held = {True: 0, False: 0}
        try:
            self._stream.wait()
        finally:
            for graph in graphs.values():
                graph.close()
            graphs.clear()  # with their bindings, which an error's traceback would otherwise keep

    def _binding(self, work: Run) -> Any:
        binding = self._session.io_binding()
        device = ("cuda", self._gpu.index)
        inputs, outputs = self._input_block.memory.pointer, self._output_block.memory.pointer
        for name, (offset, shape, dtype) in work.inputs.parts.items():
            binding.bind_input(name, *device, dtype.type, list(shape), inputs + offset)
        for name, (offset, shape, dtype) in work.outputs.parts.items():
            binding.bind_output(name, *device, dtype.type, list(shape), outputs + offset)
        return binding

    def _options(self) -> Any:
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # `_results` waits
        return options

    def _free(self) -> None:
        if self._stream.handle is None:
            return
        with suppress(BackendError):
            self._drop_graphs()
        self._session = None
        for slot in self._slots:
            slot.close()
        for resource in (self._input_block, self._output_block, self._stream):
            resource.close()

    def _failed(self, error: Exception) -> BackendError:
        if _is_out_of_memory(error):
            return self._out_of_memory(error)
        if isinstance(error, BackendError):
            return error
        return BackendError(f"onnxruntime failed to run the graph on {self._gpu}: {first_line(error)}")

    def _out_of_memory(self, error: Exception) -> BackendError:
        free = ""
        with suppress(BackendError):
            free = f", {self._cuda.free_bytes() >> 20} MiB are free"
        return BackendError(
            f"{self._gpu} has too little memory{free}; use a smaller batch_size, load one tower, or end other "
            f"processes on the GPU ({first_line(error)})"
        )


def _is_out_of_memory(error: Exception) -> bool:
    return any(words in str(error).lower() for words in _OUT_OF_MEMORY)
