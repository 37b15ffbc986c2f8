"""The part of CUDA that sessions use: memory, streams, events and graphs. It works with NVIDIA's cuda-bindings and with
CudaRuntime (runtime.py).

Every call is checked, and an error is raised as a BackendError with CUDA's message. Python objects own the memory and
free it when they are closed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np

from jinaclip.errors import BackendError, BackendMissing


class Cuda:
    """The CUDA runtime for one device.

    Args:
        device: number of the device.
        api: the runtime's functions: `cuda.bindings.runtime` or a CudaRuntime. None imports the former.

    Raises:
        BackendMissing: cuda-bindings is not installed.
        BackendError: the device cannot be used.
    """

    def __init__(self, device: int, api: Any = None) -> None:
        if api is None:
            try:
                from cuda.bindings import runtime
            except ImportError as error:
                raise BackendMissing("cuda-bindings is not installed; run: pip install 'jinaclip[tensorrt]'") from error
            api = runtime
        self.api = api
        self.device = device
        self.enter()

    def enter(self) -> None:
        """Make the device current in the calling thread. Every thread must do this once."""
        self(self.api.cudaSetDevice, self.device)

    def __call__(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        """Call a function of the API.

        Returns:
            The function's value, a tuple if it has several, None if it has none.

        Raises:
            BackendError: the call failed.
        """
        error, *values = function(*arguments)
        if int(error):
            self.api.cudaGetLastError()  # resets it, or a later call in this thread would report this error
            _, text = self.api.cudaGetErrorString(error)
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise BackendError(f"CUDA on device {self.device}: {getattr(function, '__name__', 'a call')}: {reason}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def free_bytes(self) -> int:
        """Free memory of the device, in bytes."""
        return int(self(self.api.cudaMemGetInfo)[0])


class Resource:
    """Something that CUDA allocated, and that is freed once.

    Args:
        cuda: the CUDA runtime.
        handle: the handle or pointer.
        free: the function of the API that frees it.

    Attributes:
        handle: the handle; None after `close`.
    """

    def __init__(self, cuda: Cuda, handle: Any, free: Callable[..., tuple[Any, ...]]) -> None:
        self._cuda, self.handle, self._free = cuda, handle, free

    @property
    def pointer(self) -> int:
        """The handle or pointer as a number. Memory is aligned to 256 bytes."""
        return int(self.handle)

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            with suppress(BackendError):
                self._cuda(self._free, handle)


class DeviceMemory(Resource):
    """Memory of the device. Not safe to use from several threads at once.

    Attributes:
        size: the size, in bytes.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.size = size
        try:
            super().__init__(cuda, cuda(cuda.api.cudaMalloc, max(size, 1)), cuda.api.cudaFree)
        except BackendError as error:
            free = cuda.free_bytes() >> 20
            raise BackendError(f"{error}: {size >> 20} MiB were requested, {free} MiB are free") from error


class PinnedArray(Resource):
    """An array in pinned host memory, which the device can read and write directly.

    Attributes:
        size: the size, in bytes.
        array: the memory, uint8 [size].
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.size = size
        super().__init__(cuda, cuda(cuda.api.cudaMallocHost, max(size, 1)), cuda.api.cudaFreeHost)
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(self.pointer))

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int = 0) -> np.ndarray:
        """The bytes from an offset on, as an array of this shape and dtype."""
        return self.array[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def close(self) -> None:
        self.array = np.empty(0, np.uint8)
        super().close()


class Stream(Resource):
    """A CUDA stream: its work runs in order, and concurrently with other streams."""

    def __init__(self, cuda: Cuda) -> None:
        handle = cuda(cuda.api.cudaStreamCreateWithFlags, cuda.api.cudaStreamNonBlocking)
        super().__init__(cuda, handle, cuda.api.cudaStreamDestroy)

    def upload(self, target: DeviceMemory, source: PinnedArray, size: int) -> None:
        """Copy to the device, without waiting."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._cuda(self._cuda.api.cudaMemcpyAsync, target.pointer, source.pointer, size, kind, self.handle)

    def download(self, target: PinnedArray, source: DeviceMemory, size: int, offset: int = 0) -> None:
        """Copy from the device to the host, at the same offset, without waiting."""
        kind, copy = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost, self._cuda.api.cudaMemcpyAsync
        self._cuda(copy, target.pointer + offset, source.pointer + offset, size, kind, self.handle)

    def wait(self) -> None:
        """Wait until all work in the stream is done. Other Python threads can run meanwhile."""
        self._cuda(self._cuda.api.cudaStreamSynchronize, self.handle)

    def capture(self, work: Callable[[], None], *, keeps: Any, relaxed: bool = False) -> Graph:
        """Capture the work that a function adds to the stream as a CUDA graph, without running it.

        Args:
            work: the function.
            keeps: what the captured work refers to. It is freed after the graph.
            relaxed: allow `work` to allocate memory. Other threads are not affected in either mode.
        """
        api = self._cuda.api
        modes = api.cudaStreamCaptureMode
        mode = modes.cudaStreamCaptureModeRelaxed if relaxed else modes.cudaStreamCaptureModeThreadLocal
        self._cuda(api.cudaStreamBeginCapture, self.handle, mode)
        try:
            work()
        except BaseException:
            with suppress(BackendError):  # the capture must be ended even if it is invalid
                self._cuda(api.cudaGraphDestroy, self._cuda(api.cudaStreamEndCapture, self.handle))
            raise
        return Graph(self._cuda, self._cuda(api.cudaStreamEndCapture, self.handle), keeps)


class Graph(Resource):
    """A CUDA graph: captured work that one call launches, and what this work refers to."""

    def __init__(self, cuda: Cuda, captured: Any, keeps: Any) -> None:
        self.keeps = keeps
        try:
            super().__init__(cuda, cuda(cuda.api.cudaGraphInstantiate, captured, 0), cuda.api.cudaGraphExecDestroy)
        finally:
            with suppress(BackendError):
                cuda(cuda.api.cudaGraphDestroy, captured)

    def launch(self, stream: Stream) -> None:
        self._cuda(self._cuda.api.cudaGraphLaunch, self.handle, stream.handle)


class Event(Resource):
    """A CUDA event: a position in a stream that can be waited for."""

    def __init__(self, cuda: Cuda) -> None:
        handle = cuda(cuda.api.cudaEventCreateWithFlags, cuda.api.cudaEventDisableTiming)
        super().__init__(cuda, handle, cuda.api.cudaEventDestroy)

    def record(self, stream: Stream) -> None:
        """Record the event after all work that is now in the stream."""
        self._cuda(self._cuda.api.cudaEventRecord, self.handle, stream.handle)

    def wait(self) -> None:
        """Wait until the stream has reached the event. Other Python threads can run meanwhile."""
        self._cuda(self._cuda.api.cudaEventSynchronize, self.handle)
