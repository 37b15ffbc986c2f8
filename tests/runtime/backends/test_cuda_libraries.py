"""CUDA's libraries are found where pip, torch or a toolkit puts them, without LD_LIBRARY_PATH."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jinaclip
from tests.support.from_checkout import ROOT

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


def test_operators_are_found_where_the_build_installs_them(tmp_path: Path) -> None:
    """`make cuda-operators` writes to the package's folder `native`, and the wheel takes the library from there."""
    package = tmp_path / "jinaclip"
    shutil.copytree(Path(jinaclip.__file__).parent, package, ignore=shutil.ignore_patterns("native", "__pycache__"))
    ask = "from jinaclip.backends.onnxruntime.cuda_operators import operators_library; print(operators_library())"
    command = [sys.executable, "-c", ask]
    for wanted in (None, package / "native/libjinaclip_cuda.so"):
        if wanted is not None:
            wanted.parent.mkdir()
            wanted.write_bytes(b"")
        run = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == str(wanted)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["artifacts"] == ["runtime/jinaclip/native/*.so"]
    assert "build.py --output runtime/jinaclip/native " in (ROOT / "Makefile").read_text("utf-8")
