"""CUDA's libraries are found where pip, torch or a toolkit puts them, without LD_LIBRARY_PATH."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
LOAD = "from jinaclip.backends.cuda.libraries import load; print(load('libjinaclipprobe.so.13') is not None)"


def library(path: Path) -> None:
    path.parent.mkdir(parents=True)
    source = path.with_suffix(".c")
    source.write_text("int probe(void) { return 3; }\n")
    command = ["gcc", "-shared", "-fPIC", "-o", str(path), "-Wl,-soname,libjinaclipprobe.so.13", str(source)]
    subprocess.run(command, check=True)


def found(**environment: str) -> bool:
    settings = {"PATH": "/usr/bin:/bin", **environment}
    run = subprocess.run([sys.executable, "-c", LOAD], env=settings, capture_output=True, text=True, check=True)
    return run.stdout.strip() == "True"


@needs_compiler
@pytest.mark.parametrize("folder", ["nvidia/cu13/lib", "nvidia/cublas/lib"])
def test_in_the_packages_of_pip_wherever_they_are_installed(tmp_path: Path, folder: str) -> None:
    library(tmp_path / folder / "libjinaclipprobe.so.13")
    assert not found()
    assert found(PYTHONPATH=str(tmp_path))


@needs_compiler
def test_in_a_toolkit(tmp_path: Path) -> None:
    library(tmp_path / "lib64" / "libjinaclipprobe.so.13")
    assert found(CUDA_HOME=str(tmp_path)) and found(CUDA_PATH=str(tmp_path))


@needs_compiler
def test_a_damaged_file_does_not_hide_a_good_one(tmp_path: Path) -> None:
    (tmp_path / "nvidia/a/lib").mkdir(parents=True)
    (tmp_path / "nvidia/a/lib/libjinaclipprobe.so.13").write_bytes(b"not a library")
    library(tmp_path / "nvidia/b/lib/libjinaclipprobe.so.13")
    assert found(PYTHONPATH=str(tmp_path))
