"""Checks whether ONNX Runtime's CUDA provider can be used on this machine."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinaclip.backends.cuda.api import Cuda
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.cuda.gpu_thread import gpu_thread
from jinaclip.backends.cuda.libraries import load_libraries
from jinaclip.backends.cuda.runtime import CudaRuntime
from jinaclip.backends.onnxruntime.library import import_onnxruntime
from jinaclip.errors import BackendError, BackendMissing

PROVIDER = "CUDAExecutionProvider"
LEAST_CAPABILITY = (7, 5)


def has_cuda_provider() -> bool:
    """Whether the installed onnxruntime has the CUDA provider. False if onnxruntime is not installed."""
    try:
        return PROVIDER in import_onnxruntime().get_available_providers()
    except BackendMissing:
        return False


def cuda_problem(gpu: Gpu | None = None) -> str | None:
    """Why ONNX Runtime cannot use CUDA on this machine, as a message; None if it can.

    Args:
        gpu: the GPU whose driver version, capability and availability are checked. None checks the libraries only.
    """
    ort = import_onnxruntime()
    if not has_cuda_provider():
        return f"the installed onnxruntime {ort.__version__} has no CUDA provider; run: pip install 'jinaclip[cuda]'"
    if gpu is not None and _version(gpu.driver) < (cuda_major(ort), 0):
        return (
            f"the NVIDIA driver supports CUDA {gpu.driver}, onnxruntime {ort.__version__} needs CUDA "
            f"{cuda_major(ort)}.0 or newer; update the driver"
        )
    if gpu is not None and _version(gpu.capability) < LEAST_CAPABILITY:
        return (
            f"{gpu.name} has capability {gpu.capability}, CUDA 13 needs {'.'.join(map(str, LEAST_CAPABILITY))} or newer"
        )
    try:
        library = load_libraries(cuda_major(ort))
        if gpu is not None:
            gpu_thread(gpu.index).call(_enter, library, gpu)
    except BackendError as error:
        return str(error)
    return None


def _enter(library: Any, gpu: Gpu) -> None:
    """Raises BackendError if this process cannot use the device."""
    api = CudaRuntime(library)
    try:
        cuda = Cuda(gpu.index, api)
        cuda.free_bytes()
    except BackendError as error:
        held = "; another process may use it in exclusive mode (see nvidia-smi)"
        raise BackendError(f"{gpu} cannot be used: {error}{held if 'unavailable' in str(error) else ''}") from error


@cache
def cuda_major(ort: Any) -> int:
    """Major version of the CUDA that the installed onnxruntime was built for."""
    return _version(str(getattr(ort, "cuda_version", "") or "13.0"))[0]


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)
