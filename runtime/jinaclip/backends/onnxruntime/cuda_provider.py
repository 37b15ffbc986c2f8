"""Whether ONNX Runtime's CUDA provider can be used here, and why not."""

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
    """Whether the installed onnxruntime is one for CUDA; False also where none is installed."""
    try:
        return PROVIDER in import_onnxruntime().get_available_providers()
    except BackendMissing:
        return False


def cuda_problem(gpu: Gpu | None = None) -> str | None:
    """Why ONNX Runtime cannot use CUDA here, in words; None if it can.

    Args:
        gpu: also look whether its driver is new enough and whether the device lets this process in.
    """
    ort = import_onnxruntime()
    if not has_cuda_provider():
        return f"the installed onnxruntime {ort.__version__} has no CUDA provider; run: pip install 'jinaclip[cuda]'"
    if gpu is not None and _version(gpu.driver) < (cuda_major(ort), 0):
        return (
            f"the NVIDIA driver serves CUDA {gpu.driver}, onnxruntime {ort.__version__} needs CUDA "
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
    """Raises BackendError: the device does not let this process in."""
    api = CudaRuntime(library)
    try:
        cuda = Cuda(gpu.index, api)
        cuda.free_bytes()
    except BackendError as error:
        held = "; another process may hold it in exclusive mode (nvidia-smi shows both)"
        raise BackendError(f"{gpu} cannot be used: {error}{held if 'unavailable' in str(error) else ''}") from error


@cache
def cuda_major(ort: Any) -> int:
    """Of the CUDA that the installed onnxruntime was built for."""
    return _version(str(getattr(ort, "cuda_version", "") or "13.0"))[0]


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)
