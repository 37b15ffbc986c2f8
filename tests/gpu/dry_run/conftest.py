"""What the dry run shares: `make gpu-dry-run` runs it over the stand-in for CUDA, with the real onnxruntime-gpu.

Values are not computed. What is held here is what surrounds them: which calls of CUDA are made, in which order and
thread, how many, and with how much memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jinaclip import selftest
from jinaclip.bundle import Bundle
from jinaclip.cli import main
from jinaclip.gpu import gpu
from jinaclip.prepared import open_graph
from tests.gpu.dry_run.journal import Journal
from tests.gpu.dry_run.without_comparison import UNBOUNDED

# fp16 prepared by `jinaclip build --device cuda`, and the bundle's own graphs.
KINDS = ("prepared", "fp16", "fp32")
Open = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
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


@pytest.fixture(scope="session")
def bundle(plain_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with graphs prepared for CUDA by `jinaclip build`."""
    copy = tmp_path_factory.mktemp("bundle") / "bundle"
    shutil.copytree(plain_bundle, copy)
    with pytest.MonkeyPatch.context() as patch:  # the build tests what it made, and no value is computed
        patch.setattr(selftest, "TOLERANCE", UNBOUNDED)
        assert main(["build", str(copy), "--device", "cuda"]) == 0
    return copy


@pytest.fixture
def open_session(bundle: Path, plain_bundle: Path) -> Iterator[Open]:
    """open_session(tower, kind of KINDS): a session on cuda:0; closed after the test."""
    opened = []

    def open_one(tower: str, kind: str = "prepared") -> Any:
        of = Bundle(bundle if kind == "prepared" else plain_bundle)
        session, reason = open_graph(of, tower, "fp32" if kind == "fp32" else "fp16", gpu=gpu(0))
        assert ("prepared graph" in reason) == (kind == "prepared"), reason
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
