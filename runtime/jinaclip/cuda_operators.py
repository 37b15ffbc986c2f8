"""The library of jinaclip's own CUDA operators, which ONNX Runtime loads: where it is, and who can use it.

Graphs that `jinaclip build --device cuda` prepares with these operators move a fifth of the bytes of those that have
ONNX Runtime's alone (docs/gpu.md).
"""

from __future__ import annotations

import os
from pathlib import Path

from jinaclip.errors import BackendError
from jinaclip.gpu import Gpu

VARIABLE = "JINACLIP_CUDA_OPERATORS"
LIBRARY = "libjinaclip_cuda.so"
# Of the operators' inputs, outputs and attributes; a graph that was made for another is left aside.
VERSION = 1
_LEAST_CAPABILITY = (8, 0)  # what flash attention needs


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
    """The library where this GPU can use it, else None."""
    if gpu is None or tuple(int(part) for part in gpu.capability.split(".")) < _LEAST_CAPABILITY:
        return None
    return operators_library()
