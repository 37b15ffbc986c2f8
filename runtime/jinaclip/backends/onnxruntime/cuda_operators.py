"""The library of jinaclip's own CUDA operators, which ONNX Runtime loads: where it is, and who can use it.

Graphs that `jinaclip build --device cuda` prepares with these operators need fewer launches than those that have ONNX
Runtime's alone, and run faster (docs/gpu.md).
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.cuda.gpu_thread import gpu_thread
from jinaclip.backends.cuda.libraries import load_libraries
from jinaclip.errors import BackendError

logger = logging.getLogger("jinaclip")

VARIABLE = "JINACLIP_CUDA_OPERATORS"
LIBRARY = "libjinaclip_cuda.so"
# Of the operators' inputs, outputs and attributes; a graph that was made for another is left aside.
VERSION = 3
_CUDA_MAJOR = 13  # that the library is linked with
_LEAST_CAPABILITY = (8, 0)  # of the kernels: cp.async and mma.m16n8k16


def operators_library() -> Path | None:
    """The library: the file that JINACLIP_CUDA_OPERATORS names ("" for none), or the installed one; None without.

    Raises:
        BackendError: the variable names a file that is not there.
    """
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    if named is not None:
        if not Path(named).is_file():
            raise BackendError(f"{VARIABLE} is {named!r}, which is not a file; expected {LIBRARY}, or nothing")
        return Path(named).absolute()
    installed = Path(__file__).with_name("native") / LIBRARY
    return installed if installed.is_file() else None


def operators_for(gpu: Gpu | None) -> Path | None:
    """The library where this GPU can use it, else None; says once why one that is here cannot be used."""
    library = None if gpu is None else operators_library()
    if gpu is None or library is None or (problem := _problem(library, gpu)) is None:
        return library
    _warn(f"{library.name} is not used on {gpu}: {problem}")
    return None


@cache
def _problem(library: Path, gpu: Gpu) -> str | None:
    if tuple(int(part) for part in gpu.capability.split(".")) < _LEAST_CAPABILITY:
        return f"its capability is {gpu.capability}, at least 8.0 is needed"
    return gpu_thread(gpu.index).call(_ask_library, library, gpu.index)


def _ask_library(library: Path, index: int) -> str | None:
    """What the library says of a device."""
    try:
        load_libraries(_CUDA_MAJOR)
        loaded = ctypes.CDLL(str(library))
        version, ask = loaded.jinaclip_cuda_operators_version(), loaded.jinaclip_cuda_device_error
    except (BackendError, OSError, AttributeError) as error:
        return str(error)
    if version != VERSION:
        return f"its operators have version {version}, jinaclip needs {VERSION}; build it again: make cuda-operators"
    ask.restype = ctypes.c_char_p
    said = ask(index)
    return None if said is None else said.decode()


@cache
def _warn(text: str) -> None:
    logger.warning(text)
