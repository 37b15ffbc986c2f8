"""Build the stand-in for CUDA's libraries with g++.

    python tests/gpu/stand_in/build.py DIRECTORY [--headers FOLDER]

Programs that use CUDA then run over it with LD_LIBRARY_PATH=DIRECTORY, on a machine without a GPU: the libraries keep
track of memory, streams, captures and graphs as CUDA does, and write what happens to the file that STAND_IN_JOURNAL
names (journal.h), but run no kernel and multiply nothing. machine.h lists the machines that they can play.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
# Source, name, version of the exported symbols, and libraries of this list that it calls.
LIBRARIES = (
    ("driver.cpp", "libcuda.so.1", None, ()),
    ("runtime.cpp", "libcudart.so.13", "libcudart.so.13", ()),
    ("cublas.cpp", "libcublas.so.13", "libcublas.so.13", ("libcudart.so.13",)),
    ("cublaslt.cpp", "libcublasLt.so.13", "libcublasLt.so.13", ("libcudart.so.13",)),
    ("curand.cpp", "libcurand.so.10", None, ()),
)


def find_headers() -> Path:
    """The folder of CUDA 13's headers: of an installed toolkit, or of the PyPI packages nvidia-cuda-runtime and
    nvidia-cuda-crt in this Python.
    """
    nvcc = shutil.which("nvcc")
    places = [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    places += [Path(place) / "nvidia/cu13/include" for place in sys.path if place]
    places += [Path("/usr/local/cuda/include"), *sorted(Path("/usr/local").glob("cuda-13*/include"), reverse=True)]
    places += [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    for place in places:
        if (place / "cuda_runtime_api.h").is_file() and (place / "crt/host_defines.h").is_file():
            return place
    sys.exit("CUDA 13's headers are not here; run: pip install 'nvidia-cuda-runtime==13.*' 'nvidia-cuda-crt==13.*'")


def build(directory: Path, headers: Path) -> None:
    """Compile every library into a directory."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        sys.exit(f"{compiler} is not here; the stand-in for CUDA is compiled with it")
    directory.mkdir(parents=True, exist_ok=True)

    def compile_one(library: tuple[str, str, str | None, tuple[str, ...]]) -> None:
        source, name, version, others = library
        with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
            script.write(f"{version} {{ global: *; }};\n")
            script.flush()
            words = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-I", str(headers)]
            words += [str(SOURCES / source), "-o", str(directory / name), f"-Wl,-soname,{name}", "-Wl,-rpath,$ORIGIN"]
            words += [f"-Wl,--version-script={script.name}"] if version else []
            words += [str(directory / other) for other in others] + ["-ldl"]
            subprocess.run(words, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, [library for library in LIBRARIES if not library[3]]))
        list(pool.map(compile_one, [library for library in LIBRARIES if library[3]]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--headers", type=Path, help="folder of CUDA 13's headers (default: found)")
    arguments = parser.parse_args()
    build(arguments.directory, arguments.headers or find_headers())
    print(f"LD_LIBRARY_PATH={arguments.directory.resolve()} STAND_IN_JOURNAL=FILE")
