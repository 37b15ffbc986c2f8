"""Finding CUDA's shared libraries and loading them before ONNX Runtime needs them.

ONNX Runtime's CUDA provider refers to its libraries without a path. The loader therefore finds only libraries on
LD_LIBRARY_PATH, in ld.so's cache, or already loaded in the process. pip installs them elsewhere: in the `nvidia`
packages, in one folder per library or a common one, in any directory of sys.path.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from glob import glob
from pathlib import Path

from jinaclip.errors import BackendMissing

CUDNN = "libcudnn.so.9"


def load_libraries(cuda_major: int) -> ctypes.CDLL:
    """Load the libraries that the provider for a CUDA version is linked with, dependencies first.

    Returns:
        The CUDA runtime, libcudart.

    Raises:
        BackendMissing: a library is not found; the message names it.
    """
    names = [f"{name}.so.{cuda_major}" for name in ("libcudart", "libcublasLt", "libcublas")]
    loaded = []
    for name in (*names, "libcurand.so.10"):
        library = load(name)
        if library is None:
            raise BackendMissing(
                f"{name} is not found; run: pip install 'jinaclip[cuda]', or add the folder that contains it to "
                "LD_LIBRARY_PATH"
            )
        loaded.append(library)
    return loaded[0]


@cache
def load(name: str) -> ctypes.CDLL | None:
    """Load a shared library by its soname, from the loader's paths or from `folders`; None if it is not found."""
    for path in (name, *(str(folder / name) for folder in folders())):
        with suppress(OSError):
            return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return None


def folders() -> Iterator[Path]:
    """Folders outside the loader's paths that can contain CUDA's libraries: pip packages, torch, CUDA toolkits."""
    for package, pattern in (("nvidia", "*/lib"), ("torch", "lib")):
        spec = importlib.util.find_spec(package)  # finds it without importing it
        for root in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield from sorted(Path(root).glob(pattern))
    named = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    for toolkit in (*named, *sorted(glob("/usr/local/cuda*"), reverse=True)):
        if toolkit:
            yield from (Path(toolkit) / name for name in ("lib64", "lib", "targets/x86_64-linux/lib"))
