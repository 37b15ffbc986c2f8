"""What a session needs of CUDA: memory, a stream, events, graphs. Over NVIDIA's cuda-bindings or a CudaRuntime.

Every call is checked; an error is a BackendError with CUDA's own words. Memory is owned by Python objects and freed
when they are closed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from jinaclip.errors import BackendError, BackendMissing


def import_cuda() -> Any:
    """`cuda.bindings.runtime`.

    Raises:
        BackendMissing: it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendMissing("cuda-bindings is not installed; run: pip install 'jinaclip[tensorrt]'") from error
    return runtime


class Cuda:
    """The CUDA runtime of one device.

    Args:
        device: its number.
        api: its functions: `cuda.bindings.runtime`, which is taken where None is given, or a CudaRuntime.
    """

    def __init__(self, device: int, api: Any = None) -> None:
        self.api = import_cuda() if api is None else api
        self.device = device
        self.enter()

    def enter(self) -> None:
        """Make the device current in the calling thread; each thread must, once."""
        self(self.api.cudaSetDevice, self.device)

    def __call__(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        """Call a function of the API: its value, a tuple of several, or None.

        Raises:
            BackendError: it failed.
        """
        error, *values = function(*arguments)
        if int(error):
            self.api.cudaGetLastError()  # forgotten: the next who asks in this thread would take it for their own
            _, text = self.api.cudaGetErrorString(error)
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise BackendError(f"CUDA on device {self.device}: {getattr(function, '__name__', 'a call')}: {reason}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def free_bytes(self) -> int:
        """Memory of the device that nobody uses."""
        free, _ = self(self.api.cudaMemGetInfo)
        return int(free)


class DeviceMemory:
    """Memory of the device. Not for several threads at once.

    Attributes:
        pointer: its address, aligned to 256 bytes.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda, self.size = cuda, size
        try:
            self.pointer = int(cuda(cuda.api.cudaMalloc, max(size, 1)))
        except BackendError as error:
            free = cuda.free_bytes() >> 20
            raise BackendError(f"{error}: {size >> 20} MiB were asked for, {free} MiB are free") from error

    def close(self) -> None:
        if self.pointer:
            with suppress(BackendError):
                self._cuda(self._cuda.api.cudaFree, self.pointer)
            self.pointer = 0


class PinnedArray:
    """An array in memory of the host that the device reads and writes by itself.

    Attributes:
        array: uint8, one-dimensional.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda, self.size = cuda, size
        self.pointer = int(cuda(cuda.api.cudaMallocHost, max(size, 1)))
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(self.pointer))

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Its first bytes as an array."""
        size = int(np.prod(shape)) * dtype.itemsize
        return self.array[:size].view(dtype).reshape(shape)

    def close(self) -> None:
        pointer, self.pointer = self.pointer, 0
        if pointer:
            self.array = np.empty(0, np.uint8)
            with suppress(BackendError):
                self._cuda(self._cuda.api.cudaFreeHost, pointer)


class Stream:
    """Work of the device in order, beside other streams.

    Attributes:
        handle: cudaStream_t.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle: Any = cuda(cuda.api.cudaStreamCreateWithFlags, cuda.api.cudaStreamNonBlocking)

    def upload(self, target: DeviceMemory, source: PinnedArray, size: int) -> None:
        """Copy to the device, without waiting."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._cuda(self._cuda.api.cudaMemcpyAsync, target.pointer, source.pointer, size, kind, self.handle)

    def download(self, target: PinnedArray, source: DeviceMemory, size: int, offset: int = 0) -> None:
        """Copy from the device to the same place on the host, without waiting."""
        kind, copy = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost, self._cuda.api.cudaMemcpyAsync
        self._cuda(copy, target.pointer + offset, source.pointer + offset, size, kind, self.handle)

    def wait(self) -> None:
        """Until all of it is done; other Python threads go on."""
        self._cuda(self._cuda.api.cudaStreamSynchronize, self.handle)

    def capture(self, work: Callable[[], None], *, relaxed: bool = False) -> Graph:
        """What `work` puts into the stream, as a graph; nothing of it runs.

        Args:
            relaxed: `work` may allocate memory. Calls in other threads are never affected.
        """
        api = self._cuda.api
        modes = api.cudaStreamCaptureMode
        mode = modes.cudaStreamCaptureModeRelaxed if relaxed else modes.cudaStreamCaptureModeThreadLocal
        self._cuda(api.cudaStreamBeginCapture, self.handle, mode)
        try:
            work()
        except BaseException:
            with suppress(BackendError):  # the capture is broken off, and must still end
                self._cuda(api.cudaGraphDestroy, self._cuda(api.cudaStreamEndCapture, self.handle))
            raise
        return Graph(self._cuda, self._cuda(api.cudaStreamEndCapture, self.handle))

    def close(self) -> None:
        if self.handle is not None:
            with suppress(BackendError):
                self._cuda(self._cuda.api.cudaStreamDestroy, self.handle)
            self.handle = None


class Graph:
    """Captured work, to be launched again at the cost of one call."""

    def __init__(self, cuda: Cuda, captured: Any) -> None:
        self._cuda = cuda
        try:
            self._executable: Any = cuda(cuda.api.cudaGraphInstantiate, captured, 0)
        finally:
            with suppress(BackendError):
                cuda(cuda.api.cudaGraphDestroy, captured)

    def launch(self, stream: Stream) -> None:
        self._cuda(self._cuda.api.cudaGraphLaunch, self._executable, stream.handle)

    def close(self) -> None:
        if self._executable is not None:
            with suppress(BackendError):
                self._cuda(self._cuda.api.cudaGraphExecDestroy, self._executable)
            self._executable = None


class Event:
    """A mark in a stream that can be waited for."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._event: Any = cuda(cuda.api.cudaEventCreateWithFlags, cuda.api.cudaEventDisableTiming)

    def record(self, stream: Stream) -> None:
        """Set the mark behind all that is in the stream now."""
        self._cuda(self._cuda.api.cudaEventRecord, self._event, stream.handle)

    def wait(self) -> None:
        """Until the stream has passed the mark; other Python threads go on."""
        self._cuda(self._cuda.api.cudaEventSynchronize, self._event)

    def close(self) -> None:
        if self._event is not None:
            with suppress(BackendError):
                self._cuda(self._cuda.api.cudaEventDestroy, self._event)
            self._event = None
