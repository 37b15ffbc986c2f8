"""Checks whether ONNX Runtime's CUDA provider can be used on this machine."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinaclip.backends.cuda.api import Cuda
from jinaclip.backends.cuda.gpu import Gpu, version_of
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
    needed = cuda_major(ort)
    if gpu is not None and version_of(gpu.driver) < (needed, 0):
        return (
            f"the NVIDIA driver supports CUDA {gpu.driver}, onnxruntime {ort.__version__} needs CUDA {needed}.0 or "
            "newer; update the driver"
        )
    if gpu is not None and version_of(gpu.capability) < LEAST_CAPABILITY:
        return (
            f"{gpu.name} has capability {gpu.capability}, CUDA 13 needs {'.'.join(map(str, LEAST_CAPABILITY))} or newer"
        )
    try:
        library = load_libraries(needed)
    except BackendMissing as error:
        return str(error)
    try:
        if gpu is not None:
            gpu_thread(gpu.index).call(lambda: Cuda(gpu.index, CudaRuntime(library)).free_bytes())
    except BackendError as error:
        held = "; another process may use it in exclusive mode (see nvidia-smi)"
        return f"{gpu} cannot be used: {error}{held if 'unavailable' in str(error) else ''}"
    return None


@cache
def cuda_major(ort: Any) -> int:
    """Major version of the CUDA that the installed onnxruntime was built for."""
    return version_of(str(getattr(ort, "cuda_version", "") or "13.0"))[0]
