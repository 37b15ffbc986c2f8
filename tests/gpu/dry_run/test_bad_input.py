"""A GPU that cannot be used: device="cuda" refuses in one line that names why and what to do, device="auto" goes on
with the CPU and says so once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import pytest

DRIVER, CUBLAS = "libcuda.so.1", "libcublas.so.13"
# Opens a model on each device that is named, and prints the result; warnings go to stderr.
PROGRAM = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
from jinaclip import ClipModel
from jinaclip.errors import BackendError
for device in sys.argv[2:]:
    try:
        with ClipModel(sys.argv[1], device=device) as model:
            answer = [facts["device"] for facts in model.info()["towers"].values()] + [len(model.encode_text("a"))]
    except BackendError as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer))
"""


@dataclass(frozen=True)
class Machine:
    """A machine whose GPU cannot be used.

    Attributes:
        environment: that the stand-in plays it with.
        lacks: a library that is not there.
        says: words of the message, each with its other forms.
    """

    environment: dict[str, str]
    says: Sequence[str]
    lacks: str | None = None


MACHINES = {
    "no driver": Machine({}, ("no NVIDIA driver", DRIVER), lacks=DRIVER),
    "driver too old": Machine({"STAND_IN_DRIVER": "12080"}, ("driver", "12.8", "13.0", "update")),
    "missing library": Machine({}, (CUBLAS, "not found", "pip install"), lacks=CUBLAS),
    "no device": Machine({"STAND_IN_DEVICES": "0"}, ("shows no GPU to this process", "CUDA_VISIBLE_DEVICES")),
    "hidden": Machine({"CUDA_VISIBLE_DEVICES": ""}, ("CUDA_VISIBLE_DEVICES",)),
    "driver and kernel module differ": Machine({"STAND_IN_CUINIT": "803"}, ("driver", "803")),
    "exclusive mode": Machine({"STAND_IN_EXCLUSIVE": "1"}, ("exclusive", "process")),
    "too little memory": Machine({"STAND_IN_MEMORY_MIB": "40"}, ("memory", "MiB are free")),
    "architecture without kernels": Machine({"STAND_IN_CAPABILITY": "6.1"}, ("capability 6.1", "7.5")),
}

Open = Callable[..., tuple[list[list[str | int]], str]]


@pytest.fixture
def open_on(plain_bundle: Path, stand_in: Path, tmp_path: Path) -> Open:
    """open_on(machine, *devices): what came of each device, and stderr."""

    def open_one(machine: Machine, *devices: str) -> tuple[list[list[str | int]], str]:
        libraries = stand_in
        if machine.lacks is not None:
            libraries = tmp_path / "libraries"
            libraries.mkdir()
            for library in stand_in.iterdir():
                if library.name != machine.lacks:
                    (libraries / library.name).symlink_to(library)
            _skip_where_installed(machine.lacks)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(plain_bundle), *devices], capture_output=True, text=True, timeout=120,
            env={**os.environ, "LD_LIBRARY_PATH": str(libraries), **machine.environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    return open_one


def _skip_where_installed(library: str) -> None:
    """The machine's own would be taken in place of the one that is left out."""
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    if library in known or glob(f"/usr/local/cuda*/**/{library}", recursive=True):
        pytest.skip(f"{library} is installed on this machine")


@pytest.mark.parametrize("name", MACHINES)
def test_cuda_is_refused_in_one_line(open_on: Open, name: str) -> None:
    machine = MACHINES[name]
    ((kind, message),), stderr = open_on(machine, "cuda")
    assert kind in ("BackendMissing", "BackendError")
    assert isinstance(message, str) and len(message.splitlines()) == 1 and len(message) < 500
    for words in machine.says:
        assert words in message, message
    assert stderr == ""


@pytest.mark.parametrize("name", MACHINES)
def test_auto_takes_the_cpu_and_says_so_once(open_on: Open, name: str) -> None:
    machine = MACHINES[name]
    answers, stderr = open_on(machine, "auto", "auto")
    assert answers == [["cpu", "cpu", 128]] * 2
    (warning,) = stderr.splitlines()
    assert warning.startswith("WARNING ") and machine.says[0] in warning


def test_a_device_that_is_not_there(open_on: Open) -> None:
    (answer,), _ = open_on(Machine({}, ()), "cuda:3")
    assert answer[0] == "BackendMissing" and "there is no device cuda:3; available devices: cuda:0" in str(answer[1])


def test_the_command_line_says_it_in_one_line(plain_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jinaclip", "encode", str(plain_bundle), "--device", "cuda", "a"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "STAND_IN_EXCLUSIVE": "1"},
    )  # fmt: skip
    assert done.returncode != 0 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "exclusive" in done.stderr
