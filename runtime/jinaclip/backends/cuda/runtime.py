"""The functions of the CUDA runtime that sessions use, from the same libcudart that ONNX Runtime is linked with.

Names and results, (error, values...), are the same as in NVIDIA's cuda-bindings, so that api.py works with both.

Calls that can block release the GIL. Calls that only queue work hold it: they take microseconds, while getting the GIL
back after releasing it can take milliseconds.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any


class CudaRuntime:
    """Functions of libcudart. Safe to call from any thread.

    Args:
        library: the loaded libcudart.
    """

    # Values of the enumerations in driver_types.h.
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    class cudaStreamCaptureMode:
        cudaStreamCaptureModeThreadLocal = 1
        cudaStreamCaptureModeRelaxed = 2

    class cudaMemcpyKind:
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._queueing = ctypes.PyDLL(library._name, handle=library._handle)  # holds the GIL during calls
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = getattr(self._queueing, name).argtypes = arguments
        library.cudaGetErrorString.restype = c_char_p

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (self._queueing.cudaSetDevice(device),)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        return self._pointer(self._library.cudaMalloc, size)

    def cudaFree(self, pointer: int) -> tuple[int]:
        return (self._library.cudaFree(pointer),)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        return self._pointer(self._library.cudaMallocHost, size)

    def cudaFreeHost(self, pointer: int) -> tuple[int]:
        return (self._library.cudaFreeHost(pointer),)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        free, total = c_size_t(), c_size_t()
        error = self._library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        return error, free.value, total.value

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        return (self._queueing.cudaMemcpyAsync(target, source, size, kind, stream),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return self._pointer(self._library.cudaStreamCreateWithFlags, flags)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (self._library.cudaStreamSynchronize(stream),)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (self._library.cudaStreamDestroy(stream),)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return self._pointer(self._library.cudaEventCreateWithFlags, flags)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        return (self._queueing.cudaEventRecord(event, stream),)

    def cudaEventSynchronize(self, event: int) -> tuple[int]:
        return (self._library.cudaEventSynchronize(event),)

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        return (self._library.cudaEventDestroy(event),)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        return (self._library.cudaStreamBeginCapture(stream, mode),)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:
        found = c_void_p()
        error = self._library.cudaStreamEndCapture(stream, ctypes.byref(found))
        return error, found.value or 0

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        found = c_void_p()
        error = self._library.cudaGraphInstantiate(ctypes.byref(found), graph, flags)
        return error, found.value or 0

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[int]:
        return (self._queueing.cudaGraphLaunch(executable, stream),)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[int]:
        return (self._library.cudaGraphExecDestroy(executable),)

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        return (self._library.cudaGraphDestroy(graph),)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, self._library.cudaGetErrorString(error) or b"unknown error"

    def cudaGetLastError(self) -> tuple[int, int]:
        """Return and reset the last error. Otherwise the next launch would report an error that was already handled."""
        return 0, self._library.cudaGetLastError()

    def _pointer(self, function: Any, argument: int) -> tuple[int, int]:
        found = c_void_p()
        error = function(ctypes.byref(found), argument)
        return error, found.value or 0


_ARGUMENTS: dict[str, list[Any]] = {
    "cudaSetDevice": [c_int],
    "cudaMalloc": [c_void_p, c_size_t],
    "cudaFree": [c_void_p],
    "cudaMallocHost": [c_void_p, c_size_t],
    "cudaFreeHost": [c_void_p],
    "cudaMemGetInfo": [c_void_p, c_void_p],
    "cudaMemcpyAsync": [c_void_p, c_void_p, c_size_t, c_int, c_void_p],
    "cudaStreamCreateWithFlags": [c_void_p, c_uint],
    "cudaStreamSynchronize": [c_void_p],
    "cudaStreamDestroy": [c_void_p],
    "cudaEventCreateWithFlags": [c_void_p, c_uint],
    "cudaEventRecord": [c_void_p, c_void_p],
    "cudaEventSynchronize": [c_void_p],
    "cudaEventDestroy": [c_void_p],
    "cudaStreamBeginCapture": [c_void_p, c_int],
    "cudaStreamEndCapture": [c_void_p, c_void_p],
    "cudaGraphInstantiate": [c_void_p, c_void_p, c_ulonglong],
    "cudaGraphLaunch": [c_void_p, c_void_p],
    "cudaGraphExecDestroy": [c_void_p],
    "cudaGraphDestroy": [c_void_p],
    "cudaGetErrorString": [c_int],
    "cudaGetLastError": [],
}
