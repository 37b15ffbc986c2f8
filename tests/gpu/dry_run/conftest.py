"""What the dry run shares: `make gpu-dry-run` runs it over the stand-in for CUDA, with the real onnxruntime-gpu.

Values are not computed. What is held here is what surrounds them: which calls of CUDA are made, in which order and
thread, how many, and with how much memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jinaclip.backends import self_test as selftest
from jinaclip.backends.cuda.gpu import gpu
from jinaclip.backends.onnxruntime import cuda_operators
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCuda
from jinaclip.backends.onnxruntime.cuda import OnnxRuntimeCudaSession
from jinaclip.bundle.manifest import Bundle
from jinaclip.cli import main
from tests.gpu.dry_run.journal import Journal
from tests.gpu.dry_run.without_comparison import UNBOUNDED

# fp16 prepared by `jinaclip build --device cuda`, without jinaclip's own operators, and with them where
# JINACLIP_CUDA_OPERATORS names their library; and the bundle's own graphs.
KINDS = ("prepared", "operators", "fp16", "fp32")
OPERATORS = os.environ.get(cuda_operators.VARIABLE, "")
Open = Callable[..., OnnxRuntimeCudaSession]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.dry_run)


@pytest.fixture(scope="session")
def journal() -> Journal:
    path = os.environ.get("STAND_IN_JOURNAL")
    if not path:
        pytest.exit("these tests run over the stand-in for CUDA: make gpu-dry-run", returncode=2)
    return Journal(Path(path))


@pytest.fixture(scope="session")
def stand_in(journal: Journal) -> Path:
    """The directory of the stand-in's libraries."""
    return Path(os.environ["LD_LIBRARY_PATH"].split(os.pathsep)[0])


@pytest.fixture(scope="session")
def plain_bundle(journal: Journal) -> Path:
    """A small random bundle in fp32 and fp16, as exported. Read-only."""
    return Path(os.environ["JINACLIP_DRY_RUN_BUNDLE"])


@pytest.fixture(autouse=True)
def no_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests ask for jinaclip's own operators where they want them."""
    monkeypatch.setenv(cuda_operators.VARIABLE, "")


@pytest.fixture(scope="session")
def bundle(plain_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with graphs prepared for CUDA by `jinaclip build`."""
    return _built(plain_bundle, tmp_path_factory.mktemp("bundle") / "bundle", operators="")


@pytest.fixture(scope="session")
def operators_bundle(plain_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with graphs prepared over jinaclip's own operators."""
    if not OPERATORS:
        pytest.skip(f"{cuda_operators.VARIABLE} names no library")
    return _built(plain_bundle, tmp_path_factory.mktemp("operators") / "bundle", operators=OPERATORS)


def _built(plain_bundle: Path, copy: Path, *, operators: str) -> Path:
    shutil.copytree(plain_bundle, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "TOLERANCE", UNBOUNDED)  # the build tests what it made, and no value is computed
        patch.setenv(cuda_operators.VARIABLE, operators)
        assert main(["build", str(copy), "--device", "cuda"]) == 0
    return copy


@pytest.fixture
def open_session(
    bundle: Path, plain_bundle: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Open]:
    """open_session(tower, kind of KINDS): a session on cuda:0; closed after the test."""
    opened = []

    def open_one(tower: str, kind: str = "prepared") -> OnnxRuntimeCudaSession:
        directory = plain_bundle if kind in ("fp16", "fp32") else bundle
        if kind == "operators":
            directory = request.getfixturevalue("operators_bundle")
            monkeypatch.setenv(cuda_operators.VARIABLE, OPERATORS)
        of = Bundle(directory)
        session, reason = OnnxRuntimeCuda(gpu(0)).open(of, tower, "fp32" if kind == "fp32" else "fp16")
        assert isinstance(session, OnnxRuntimeCudaSession)
        assert ("prepared graph" in reason) == (kind not in ("fp16", "fp32")), reason
        assert (session.describe()["operators"] is not None) == (kind == "operators")
        opened.append(session)
        return session

    yield open_one
    for session in opened:
        session.close()


@pytest.fixture(scope="session")
def make_batch(plain_bundle: Path) -> Callable[..., dict[str, np.ndarray]]:
    """make_batch(tower, rows, tokens): an input of its graph; texts without padding, of so many tokens each."""
    of = Bundle(plain_bundle)
    size, pad = of.preprocessing.size, of.special_ids["pad"]

    def make(tower: str, rows: int, tokens: int = 7) -> dict[str, np.ndarray]:
        name = of.tower(tower).input_name
        if tower == "image":
            return {name: np.zeros((rows, size, size, 3), np.uint8)}
        ids = np.full((rows, tokens), 5, np.int64)
        assert pad != 5
        ids[:, 0], ids[:, -1] = 0, 2
        return {name: ids}

    return make
