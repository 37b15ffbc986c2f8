"""Small random bundles that every test file may use: made once a run, never written to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jinaclip import ClipModel
from jinaclip_export.bundle.manifest import Identity
from jinaclip_export.bundle.writer import export_bundle
from jinaclip_export.checkpoint.random_weights import SIZES, published_config, write_random_checkpoint
from jinaclip_export.checkpoint.reader import Checkpoint

# Multilingual, written for these tests: different scripts, lengths and shapes of text.
TEXTS = [
    "A beautiful sunset over the beach",
    "Un beau coucher de soleil sur la plage",
    "Ein wunderschöner Sonnenuntergang am Strand",
    "海滩上美丽的日落",
    "浜辺に沈む美しい夕日",
    "해변 위로 아름다운 일몰",
    "غروب جميل على الشاطئ",
    "समुद्र तट पर एक खूबसूरत सूर्यास्त",
    "Ένα ηλιοβασίλεμα πάνω από την παραλία",
    "Красивый закат над пляжем",
    "cat",
    "A cup of coffee on a wooden table, photographed from above in the morning light.",
    "   leading, trailing   and   inner blanks   ",
    "Ｆｕｌｌｗｉｄｔｈ and ﬁ ligature, ½ and №",
]
# Photos of scikit-image; without it (a GPU machine with little on it) the tests that look at them cannot be collected.
_SKIMAGE = find_spec("skimage")
PHOTOS_DIRECTORY = Path(_SKIMAGE.origin if _SKIMAGE and _SKIMAGE.origin else "scikit-image-is-missing").parent / "data"
PHOTOS = [PHOTOS_DIRECTORY / n for n in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg")]

# A job that a shell starts in the background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MakeCheckpoint = Callable[..., Path]


def pytest_report_header() -> str:
    place = tempfile.gettempdir()
    return f"free in {place}: {shutil.disk_usage(place).free / 2**30:.1f} GiB (the tests write several)"


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """make_checkpoint(projection_dim, text=…, vision=…, **options): a random checkpoint in a new directory."""

    def make(
        dim: int = 128, *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **options: Any
    ) -> Path:
        directory = tmp_path_factory.mktemp("checkpoint")
        write_random_checkpoint(directory, published_config(dim, text, vision), **options)
        return directory

    return make


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `jinaclip export --random small` starts from."""
    directory = tmp_path_factory.mktemp("small") / "checkpoint"
    write_random_checkpoint(directory, published_config(**SIZES["small"]))
    return directory


@pytest.fixture(scope="session")
def small_bundle(small_checkpoint: Path) -> Path:
    """The bundle of `small_checkpoint`. Read-only: copy it before changing anything."""
    output = small_checkpoint.parent / "bundle"
    export_bundle(Checkpoint(small_checkpoint), output, identity=Identity("random-small", None, "none"))
    return output


@pytest.fixture(scope="session")
def precise_bundle(small_checkpoint: Path) -> Path:
    """The same checkpoint in every precision. Read-only: copy it before changing anything."""
    output = small_checkpoint.parent / "precise"
    identity = Identity("random-small", None, "none")
    export_bundle(Checkpoint(small_checkpoint), output, identity=identity, precisions=("fp32", "fp16", "int8"))
    return output


@pytest.fixture(scope="session")
def wide_bundle(make_checkpoint: MakeCheckpoint) -> Path:
    """Two blocks of the published width and picture size, in fp32 and fp16. Read-only."""
    checkpoint = make_checkpoint(1024, text={"vocab_size": 36864, "num_hidden_layers": 2}, vision={"layers": 2})
    output = checkpoint.with_name(f"{checkpoint.name}-bundle")
    export_bundle(
        Checkpoint(checkpoint), output, identity=Identity("random-wide", None, "none"), precisions=("fp32", "fp16")
    )
    return output


@pytest.fixture(scope="session")
def model(small_bundle: Path) -> Iterator[ClipModel]:
    """An opened `small_bundle`."""
    with ClipModel(small_bundle) as opened:
        yield opened


@pytest.fixture
def fresh_home(tmp_path: Path) -> dict[str, str]:
    """Environment for a child process whose home directory is new and empty: $HOME is tmp_path / "home"."""
    home = tmp_path / "home"
    home.mkdir()
    names = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "ORT_DISABLE_TELEMETRY", "CI")
    return {k: v for k, v in os.environ.items() if k not in names} | {"HOME": str(home)}


@pytest.fixture(scope="session")
def host_operators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA operators of the domain `jinaclip`, built from their sources for ONNX Runtime's CPU provider."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler (g++ or $CXX) to build the operators for the host")
    directory = tmp_path_factory.mktemp("host-operators")
    build = Path(__file__).parent.parent / "runtime/c-library/cuda/build.py"
    command = [sys.executable, str(build), "--host", "--output", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())
