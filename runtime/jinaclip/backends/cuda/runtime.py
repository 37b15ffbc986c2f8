"""The functions of the CUDA runtime that sessions use, from the same libcudart that ONNX Runtime is linked with.

Names and results, (error, values...), are the same as in NVIDIA's cuda-bindings, so that api.py works with both.

Calls that can block release the GIL. Calls that only queue work hold it: they take microseconds, while getting the GIL
back after releasing it can take milliseconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

RESULT = ctypes.POINTER(c_void_p)  # argument through which a function returns a value: a handle, a pointer or a size
_ARGUMENTS: dict[str, list[Any]] = {
    "cudaSetDevice": [c_int],
    "cudaMalloc": [RESULT, c_size_t],
    "cudaFree": [c_void_p],
    "cudaMallocHost": [RESULT, c_size_t],
    "cudaFreeHost": [c_void_p],
    "cudaMemGetInfo": [RESULT, RESULT],
    "cudaMemcpyAsync": [c_void_p, c_void_p, c_size_t, c_int, c_void_p],
    "cudaStreamCreateWithFlags": [RESULT, c_uint],
    "cudaStreamSynchronize": [c_void_p],
    "cudaStreamDestroy": [c_void_p],
    "cudaEventCreateWithFlags": [RESULT, c_uint],
    "cudaEventRecord": [c_void_p, c_void_p],
    "cudaEventSynchronize": [c_void_p],
    "cudaEventDestroy": [c_void_p],
    "cudaStreamBeginCapture": [c_void_p, c_int],
    "cudaStreamEndCapture": [c_void_p, RESULT],
    "cudaGraphInstantiate": [RESULT, c_void_p, c_ulonglong],
    "cudaGraphLaunch": [c_void_p, c_void_p],
    "cudaGraphExecDestroy": [c_void_p],
    "cudaGraphDestroy": [c_void_p],
    "cudaGetLastError": [],
}
_ONLY_QUEUE = ("cudaSetDevice", "cudaMemcpyAsync", "cudaEventRecord", "cudaGraphLaunch")


class CudaRuntime:
    """Functions of libcudart, those of _ARGUMENTS as attributes. Safe to call from any thread.

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
        holding_gil = ctypes.PyDLL(library._name, handle=library._handle)
        for name, arguments in _ARGUMENTS.items():
            function = getattr(holding_gil if name in _ONLY_QUEUE else library, name)
            function.argtypes = arguments
            setattr(self, name, _call_of(function))
        library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = [c_int], c_char_p

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, self._library.cudaGetErrorString(error) or b"unknown error"


def _call_of(function: Any) -> Callable[..., tuple[int, ...]]:
    """A function that passes its arguments to a function of libcudart, and returns the error and the results."""
    has_results = RESULT in function.argtypes

    def call(*arguments: Any) -> tuple[int, ...]:
        if not has_results:
            return (function(*arguments),)
        given = iter(arguments)
        every = [c_void_p() if kind is RESULT else next(given) for kind in function.argtypes]
        error = function(*every)  # a c_void_p that is passed for RESULT is passed by reference
        return error, *(value.value or 0 for value in every if isinstance(value, c_void_p))

    call.__name__ = function.__name__
    return call
