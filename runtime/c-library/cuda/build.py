"""Build the operators' library: libjinaclip_cuda.so with nvcc, or libjinaclip_cuda_host.so with g++ for tests.

    python build.py --output DIR                the CUDA library for all architectures
    python build.py --output DIR --arch 90      for one
    python build.py --output DIR --host         the same operators for ONNX Runtime's CPU provider

The CUDA library needs nvcc 13.0 and cuBLAS 13's header and library: those of a toolkit, or of the Python packages that
`make cuda-operators` installs. At run time it loads libcudart.so.13 and libcublasLt.so.13.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA_LIBRARY = "libjinaclip_cuda.so"
HOST_LIBRARY = "libjinaclip_cuda_host.so"

# Machine code for these compute capabilities, and PTX of two of them for others and later ones.
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
PTX = ("90", "120")
# Code for one GPU generation alone, with its own instructions: warpgroup products.
SPECIFIC = {"90": "90a"}

WARNINGS = ("-Wall", "-Wextra")


class BuildError(Exception):
    """The library cannot be built here; the message says what is missing or what the compiler said."""


def run(command: Sequence[str]) -> None:
    print(shlex.join(command), file=sys.stderr)
    if subprocess.run(command).returncode != 0:
        raise BuildError(f"{command[0]} failed")


def find(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise BuildError(f"{program} is not on the PATH")
    return path


def build_host(output: Path) -> Path:
    """The operators for the CPU provider, for this machine's CPU."""
    library = output / HOST_LIBRARY
    sources = [path for path in sorted(HERE.glob("*.cu")) if path.name not in ("linear.cu", "device_check.cu")]
    sources += [HERE / "linear_host.cpp", HERE / "operators.cpp"]
    run(
        [
            *(find(os.environ.get("CXX", "g++")), "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared"),
            *("-fvisibility=hidden", "-U_FORTIFY_SOURCE", *WARNINGS, "-Wno-unknown-pragmas", "-DJINACLIP_HOST"),
            *("-x", "c++", *map(str, sources), "-o", str(library)),
        ]
    )
    return library


def cublas_roots(nvcc: str) -> Iterator[Path]:
    yield Path(nvcc).resolve().parent.parent
    if "CUDA_HOME" in os.environ:
        yield Path(os.environ["CUDA_HOME"])
    yield Path("/usr/local/cuda")
    spec = importlib.util.find_spec("nvidia")
    for packages in (spec.submodule_search_locations if spec is not None else None) or ():
        yield Path(packages) / "cu13"


def find_cublas(nvcc: str) -> tuple[Path, Path]:
    """The folder of cublasLt.h, and libcublasLt.so.13."""
    for root in cublas_roots(nvcc):
        for folder in ("lib", "lib64"):
            header, library = root / "include" / "cublasLt.h", root / folder / "libcublasLt.so.13"
            if header.is_file() and library.is_file():
                return header.parent, library
    raise BuildError("cublasLt.h with libcublasLt.so.13 is not found; install nvidia-cublas>=13,<14")


def build_cuda(output: Path, architectures: Sequence[str], ptx: Sequence[str]) -> Path:
    """The operators for the CUDA provider."""
    nvcc = find("nvcc")
    include, cublas = find_cublas(nvcc)
    library, runtime = output / CUDA_LIBRARY, cublas.with_name("libcudart.so.13")
    names = [SPECIFIC.get(number, number) for number in architectures]
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    targets += [f"-gencode=arch=compute_{number},code=compute_{number}" for number in ptx]
    with tempfile.TemporaryDirectory() as links:
        if runtime.is_file():  # the Python package has it under this name alone, and nvcc asks for the one without 13
            Path(links, "libcudart.so").symlink_to(runtime)
        command = [
            *(nvcc, "-std=c++17", "-O3", "-shared", "-cudart", "shared", "--threads", "0", *targets),
            *("-Xcompiler", ",".join(["-fPIC", "-fvisibility=hidden", *WARNINGS]), "-I", str(include)),
            *(*map(str, sorted(HERE.glob("*.cu"))), *map(str, (HERE / "operators.cpp", HERE / "current_device.cpp"))),
            *("-L", links, "-L", str(cublas.parent), f"-l:{cublas.name}", "-o", str(library)),
        ]
        run(command)
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the library, made if missing")
    parser.add_argument("--host", action="store_true", help="build for the CPU provider, with g++ or $CXX")
    parser.add_argument("--arch", action="append", metavar="NUMBER", help="only this compute capability, e.g. 90")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        library = (
            build_host(args.output)
            if args.host
            else build_cuda(args.output, args.arch or ARCHITECTURES, () if args.arch else PTX)
        )
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
