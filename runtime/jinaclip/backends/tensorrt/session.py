"""Sessions for TensorRT and TensorRT-RTX plans that `jinaclip build` made for this GPU (plans.py).

Batches are padded to a bucket (backends/shapes.py). Each worker has its own stream and memory, so that the copies of
one worker overlap with the computation of another.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.backends.base import Arrays, Names, gpu_facts, keep_after_fork, require_open
from jinaclip.backends.cost import GPU_COST
from jinaclip.backends.cuda.api import Cuda
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.machine import available_threads
from jinaclip.backends.pool import Pool
from jinaclip.backends.shapes import Bucket, common_buckets, most_rows
from jinaclip.backends.tensorrt.engine import Engine, Plan
from jinaclip.backends.tensorrt.library import Library
from jinaclip.backends.tensorrt.worker import Worker
from jinaclip.errors import BackendError, InputError

FINITE = "all_finite"  # output of the graph: whether all components of a row's vector are finite
WORKERS = 2


class TensorRTSession:
    """A session for a plan on one GPU. Safe to call from several threads at once.

    Args:
        plan: the plan. Plans contain code: pass only files that `jinaclip build` wrote, after checking the sha256.
        gpu: the GPU that the plan was built for, from `gpu()`. TensorRT must not be used without a driver.
        library: the library that built the plan.
        pad: token id that fills the rest of a row.
        workers: number of runs at the same time. Each worker needs memory for activations.
        cache: file for the kernels that TensorRT-RTX compiles for this GPU. The constructor then runs the common
            shapes once, so that their kernels exist before the first request. None stores no kernels and runs nothing.

    Raises:
        EngineMismatch: the library cannot load the plan.
        BackendError: CUDA or TensorRT failed, or there is too little memory.
    """

    cost = GPU_COST

    def __init__(
        self, plan: Plan, *, gpu: Gpu, library: Library, pad: int = 0, workers: int = WORKERS, cache: Path | None = None
    ) -> None:
        self.backend, self.device, self.threads = library.backend, f"cuda:{gpu.index}", available_threads()
        self.concurrency = workers
        self.profiles, self.key = plan.profiles, plan.key
        self._gpu, self._library = gpu, library
        self._process = os.getpid()
        self._closing = threading.RLock()
        keep_after_fork(self)
        cuda = Cuda(gpu.index)
        self._workers: list[Worker] = []
        with ExitStack() as resources:  # frees them if the rest fails
            engine = Engine(plan, gpu=gpu, library=library, kernels=cache)
            resources.callback(engine.close)
            uncaptured: set[Bucket] = set()
            for _ in range(workers):
                worker = Worker(cuda, engine, pad=pad, uncaptured=uncaptured)
                resources.callback(worker.close)
                self._workers.append(worker)
            if cache is not None and self.backend == "tensorrt-rtx":
                self._compile_kernels(engine)
            self._resources = resources.pop_all()
        self._engine: Engine | None = engine
        self._pool = Pool(self._workers)

    def run(
        self, inputs: Arrays, *, outputs: Names = None, interruptible: bool = False, release_memory: bool = False
    ) -> dict[str, np.ndarray]:
        """Run a batch; see `Session.run`. A batch larger than the profiles runs in parts. The outputs of an empty batch
        are empty.
        """
        engine = require_open(self._process, self._engine)
        source = engine.source
        (name, batch), *others = inputs.items()
        if others or name != source.name:
            raise InputError(f"the engine's input is {source.name}, found {', '.join(inputs)}")
        tokens = batch.shape[1] if source.has_tokens else None
        if tokens is None and tuple(batch.shape[1:]) != source.row:
            raise InputError(f"{name} has rows of shape {list(batch.shape[1:])}, expected {list(source.row)}")
        most = most_rows(tokens, self.profiles)
        if most == 0:
            longest = max(profile.tokens[2] for profile in self.profiles if profile.tokens)
            raise InputError(
                f"a text has {tokens} tokens, this engine was built for at most {longest}; pass max_length={longest}, "
                "or build an engine with a longer profile (jinaclip build --profile)"
            )
        parts = [{tensor.name: np.empty((0, *tensor.row), tensor.dtype) for tensor in engine.outputs}]
        for start in range(0, len(batch), most):
            with self._pool.borrow() as loan:
                worker = require_open(self._process, loan.item)  # another thread may have closed the session meanwhile
                parts.append(worker.run(np.ascontiguousarray(batch[start : start + most])))
        found = {tensor.name: np.concatenate([part[tensor.name] for part in parts]) for tensor in engine.outputs}
        finite = found.pop(FINITE, None)
        if finite is not None and not finite.all():
            row = int(np.flatnonzero(~finite.astype(bool))[0])
            raise BackendError(
                f"{self.key} on {self._gpu.name} returned NaN or infinity for row {row} of the batch; run `jinaclip "
                "certify` for this engine, or use another precision"
            )
        return {name: found[name] for name in outputs or found}

    def describe(self) -> dict[str, Any]:
        return gpu_facts(self.backend, self._library.version, self._gpu) | {
            "device_index": self._gpu.index,
            "threads": self.threads,
            "prepared": self.key,
            "profiles": [profile.name for profile in self.profiles],
            "workers": self.concurrency,
        }

    def close(self) -> None:
        """Wait for current runs to end and free the engine. Runs that have not started raise "this model is closed"."""
        if os.getpid() != self._process:
            return
        with self._closing:  # a second thread that closes the session waits until it is freed
            engine = self._engine
            if engine is None:
                return
            self._pool.close()
            self._engine = None
            with self._resources:  # they are freed when the block ends
                engine.save_kernels()

    def __del__(self) -> None:
        with suppress(Exception):  # __init__ may have failed
            self.close()

    def graphs(self) -> int:
        """Current number of captured CUDA graphs."""
        return sum(len(worker.graphs) for worker in self._workers)

    def _compile_kernels(self, engine: Engine) -> None:
        """Run the common shapes once on every worker. TensorRT-RTX compiles kernels at the first run of each shape."""
        for worker in self._workers:
            for bucket in common_buckets(self.profiles):
                worker.run(np.zeros(engine.source.shape(bucket), engine.source.dtype))
        engine.save_kernels()
