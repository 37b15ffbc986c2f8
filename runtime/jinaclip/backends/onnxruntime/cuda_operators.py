"""The library of jinaclip's own CUDA operators for ONNX Runtime: its path, and whether a GPU can use it.

Graphs that `jinaclip build --device cuda` prepares with these operators need fewer kernel launches than graphs that use
ONNX Runtime's operators only, and run faster (docs/gpu.md).
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinaclip.backends.cuda.gpu import Gpu, version_of
from jinaclip.backends.cuda.gpu_thread import gpu_thread
from jinaclip.backends.cuda.libraries import load_libraries
from jinaclip.errors import BackendError

logger = logging.getLogger("jinaclip")
_warn_once = cache(logger.warning)

VARIABLE = "JINACLIP_CUDA_OPERATORS"
LIBRARY = "libjinaclip_cuda.so"
# Version of the operators' inputs, outputs and attributes. Graphs prepared for another version are not used.
VERSION = 3
_CUDA_MAJOR = 13  # CUDA version that the library is linked with
_LEAST_CAPABILITY = (8, 0)  # needed for cp.async and mma.m16n8k16


def operators_library() -> Path | None:
    """Path of the library: the value of JINACLIP_CUDA_OPERATORS, or the installed file if the variable is not set. None
    if the variable is empty or no file is installed.

    Raises:
        BackendError: the variable is set to a file that does not exist.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        installed = Path(str(files("jinaclip"))) / "native" / LIBRARY
        return installed if installed.is_file() else None
    if named and not Path(named).is_file():
        raise BackendError(f"{VARIABLE} is {named!r}, which is not a file; expected a path of {LIBRARY}, or ''")
    return Path(named).absolute() if named else None


def operators_for(gpu: Gpu) -> Path | None:
    """Path of the library if this GPU can use it, else None. Logs once why an existing library cannot be used."""
    library = operators_library()
    if library is None or (problem := _problem(library, gpu)) is None:
        return library
    _warn_once(f"{library.name} is not used on {gpu}: {problem}")
    return None


@cache
def _problem(library: Path, gpu: Gpu) -> str | None:
    if version_of(gpu.capability) < _LEAST_CAPABILITY:
        return f"its capability is {gpu.capability}, expected at least 8.0"
    return gpu_thread(gpu.index).call(_ask_library, library, gpu.index)


def _ask_library(library: Path, index: int) -> str | None:
    """Why the library cannot be used on a device; None if it can."""
    try:
        load_libraries(_CUDA_MAJOR)
        loaded = ctypes.CDLL(str(library))
        version, ask = loaded.jinaclip_cuda_operators_version(), loaded.jinaclip_cuda_device_error
    except (BackendError, OSError, AttributeError) as error:
        return str(error)
    if version != VERSION:
        return f"its operators have version {version}, expected {VERSION}; build it again: make cuda-operators"
    ask.restype = ctypes.c_char_p
    said = ask(index)
    return None if said is None else said.decode()
