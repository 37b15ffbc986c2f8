"""A worker of a TensorRT session: a CUDA stream, staging memory, execution contexts and captured CUDA graphs.

After the first run of a small bucket (backends/shapes.py), the run and its copies are captured as a CUDA graph. Later
runs of this bucket need one launch. Every graph has its own context, because a context that runs another shape can
overwrite values that the graph reads. All contexts of a worker share one block of memory for activations, because they
never run at the same time.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import numpy as np

from jinaclip.backends.cuda.api import Cuda, DeviceMemory, Graph, PinnedArray, Resource, Stream
from jinaclip.backends.shapes import Bucket, bucket_for, pad_into
from jinaclip.backends.tensorrt.engine import Engine
from jinaclip.backends.tensorrt.library import Messages
from jinaclip.errors import BackendError

logger = logging.getLogger("jinaclip")
R = TypeVar("R", bound=Resource)

# Largest bucket with a CUDA graph. In larger runs the kernels take longer than their launches (docs/decisions/021).
GRAPH_TOKENS, GRAPH_IMAGES = 2048, 4
MOST_GRAPHS = 128  # per worker; enough for all small buckets of jinaclip's profile sets. Graphs are not replaced.


class Worker:
    """A worker, which does one run at a time. Not safe to use from several threads at once.

    Args:
        cuda: the CUDA runtime.
        engine: the loaded plan.
        pad: token id that fills the rest of a row.
        uncaptured: buckets whose capture failed, which run without a graph. All workers of a session share this set.

    Attributes:
        graphs: captured graphs by bucket, at most MOST_GRAPHS.

    Raises:
        BackendError: CUDA or TensorRT failed, or there is too little memory.
    """

    def __init__(self, cuda: Cuda, engine: Engine, *, pad: int, uncaptured: set[Bucket]) -> None:
        self._cuda, self._engine, self._pad, self._uncaptured = cuda, engine, pad, uncaptured
        self.graphs: dict[Bucket, Graph] = {}  # each keeps its context
        self._contexts: list[Any] = []  # by profile
        self._resources = ExitStack()  # closes them in reverse order
        self._host: dict[str, PinnedArray] = {}  # by tensor, as is the memory of the device
        self._device: dict[str, DeviceMemory] = {}
        self._stream = self._hold(Stream(cuda))
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Run a batch that is within a profile and has at least one row. Returns all outputs by name."""
        self._cuda.enter()  # the previous run may have been in another thread
        source = self._engine.source
        bucket = bucket_for(len(batch), batch.shape[1] if source.has_tokens else None, self._engine.profiles)
        assert bucket is not None
        pad_into(self._host[source.name].view(source.shape(bucket), source.dtype), batch, self._pad)
        graph = self.graphs.get(bucket)
        try:
            if graph is not None:
                graph.launch(self._stream)
            else:
                context = self._contexts[bucket.profile]
                self._set_shape(context, bucket)
                self._enqueue(context, bucket)
        finally:
            self._stream.wait()  # also after an error, because the next run writes to the memory that this one reads
        outputs = {
            tensor.name: self._host[tensor.name].view(tensor.shape(bucket), tensor.dtype)[: len(batch)].copy()
            for tensor in self._engine.outputs
        }
        if graph is None and self._may_capture(bucket):
            self._capture(bucket)
        return outputs

    def close(self) -> None:
        """Wait for the current run, then free everything."""
        with suppress(BackendError):
            self._cuda.enter()
            self._stream.wait()
        for graph in self.graphs.values():
            graph.close()
        self.graphs.clear()
        self._contexts.clear()
        self._resources.close()

    def _allocate(self) -> None:
        cuda, engine = self._cuda, self._engine
        largest = [
            Bucket(index, profile.batch[2], profile.tokens and profile.tokens[2])
            for index, profile in enumerate(engine.profiles)
        ]
        for tensor in (engine.source, *engine.outputs):
            size = max(tensor.bytes(bucket) for bucket in largest)
            self._device[tensor.name] = self._hold(DeviceMemory(cuda, size))
            self._host[tensor.name] = self._hold(PinnedArray(cuda, size))
        self._activations = self._hold(DeviceMemory(cuda, engine.context_bytes))
        self._contexts += [self._context(index) for index in range(len(engine.profiles))]

    def _context(self, profile: int) -> Any:
        """Create a context for one profile that uses this worker's memory."""
        context = self._engine.context(profile, self._activations.pointer, self._stream.pointer)
        for name, memory in self._device.items():
            if not context.set_tensor_address(name, memory.pointer):
                raise BackendError(f"the engine does not accept an address for its tensor {name}")
        self._stream.wait()
        return context

    def _set_shape(self, context: Any, bucket: Bucket) -> None:
        source = self._engine.source
        if not context.set_input_shape(source.name, source.shape(bucket)):
            raise BackendError(f"the engine does not accept the shape {list(source.shape(bucket))}")

    def _enqueue(self, context: Any, bucket: Bucket) -> None:
        """Copy the inputs, run, and copy the outputs, without waiting."""
        source = self._engine.source
        self._stream.upload(self._device[source.name], self._host[source.name], source.bytes(bucket))
        with Messages(self._engine.library) as messages:
            if not context.execute_async_v3(self._stream.pointer):
                raise BackendError(f"the engine failed to run: {messages.errors()}")
        for tensor in self._engine.outputs:
            self._stream.download(self._host[tensor.name], self._device[tensor.name], tensor.bytes(bucket))

    def _may_capture(self, bucket: Bucket) -> bool:
        is_small = bucket.rows <= GRAPH_IMAGES if bucket.tokens is None else bucket.rows * bucket.tokens <= GRAPH_TOKENS
        return self._engine.captures and is_small and bucket not in self._uncaptured and len(self.graphs) < MOST_GRAPHS

    def _capture(self, bucket: Bucket) -> None:
        """Capture a graph for a bucket that has just run. If that fails, the bucket runs without a graph."""
        context = None
        try:
            context = self._context(bucket.profile)
            self._set_shape(context, bucket)
            self._enqueue(context, bucket)  # a context's first run initialises it and must not be captured
            self._stream.wait()
            self.graphs[bucket] = self._stream.capture(lambda: self._enqueue(context, bucket), keeps=context)
        except Exception as error:  # the bindings also raise their own exceptions
            if bucket not in self._uncaptured:
                self._uncaptured.add(bucket)
                shape = [bucket.rows] if bucket.tokens is None else [bucket.rows, bucket.tokens]
                reason = str(error)  # as text, because log records would keep the error's context alive
                logger.warning(
                    "CUDA graph capture failed for batches of %s; they run without a graph: %s", shape, reason
                )
        finally:
            with suppress(BackendError):  # the context may be freed once it is not running
                self._stream.wait()

    def _hold(self, resource: R) -> R:
        self._resources.callback(resource.close)
        return resource
