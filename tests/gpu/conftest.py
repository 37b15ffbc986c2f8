"""What the GPU tests share. They run with `make gpu-test` on a machine that has an NVIDIA GPU.

JINACLIP_GPU_SIZE=full takes the full-size random model instead of the small one (5 GB of disk, some minutes to make).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from jinaclip import ClipModel
from jinaclip.backends.cuda.gpu import Gpu, driver_problem, gpu
from jinaclip.backends.onnxruntime.cuda_provider import cuda_problem
from jinaclip.backends.tensorrt.library import load_library
from jinaclip.bundle.manifest import Bundle
from jinaclip.cli import main
from jinaclip.errors import BackendError, BackendMissing
from tests.conftest import TEXTS

BACKENDS = ("onnxruntime", "tensorrt-rtx", "tensorrt")
Expected = tuple[list[str], list[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """A backend that this GPU takes, with the bundle that its engines were built in, and what an item's vector is."""

    backend: str
    bundle: Path
    texts: list[str]
    pictures: list[np.ndarray]
    expected: dict[str, np.ndarray]  # fp32 unit vectors from the CPU, by tower

    def open(self, **settings: object) -> ClipModel:
        return ClipModel(self.bundle, backend=self.backend, device="cuda", precision="fp16", **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def device() -> Gpu:
    if problem := driver_problem():
        if os.environ.get("JINACLIP_REQUIRE_GPU"):
            pytest.exit(f"make gpu-test needs an NVIDIA GPU, and {problem}", returncode=1)
        pytest.skip(problem)
    return gpu(0)


@pytest.fixture(scope="session")
def gpu_bundle(device: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bundle in fp32 and fp16."""
    output = tmp_path_factory.mktemp("gpu") / "bundle"
    size = os.environ.get("JINACLIP_GPU_SIZE", "small")
    assert main(["export", "--random", size, "--precision", "fp32,fp16", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def expected(gpu_bundle: Path) -> Expected:
    """Texts, pictures, and their vectors in float32 on the CPU."""
    rng = np.random.default_rng(0)
    texts = [*TEXTS, "a", "", " ".join(TEXTS * 4), *(f"{text} {number}" for number, text in enumerate(TEXTS))]
    size = Bundle(gpu_bundle).preprocessing.size
    pictures = [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(5)]
    pictures.append(rng.integers(0, 2, (size, size, 3), np.uint8) * np.uint8(255))
    with ClipModel(gpu_bundle, device="cpu", precision="fp32") as model:
        return texts, pictures, {"text": model.encode_text(texts), "image": model.encode_image(pictures)}


@pytest.fixture(scope="session", params=BACKENDS)
def case(request: pytest.FixtureRequest, gpu_bundle: Path, expected: Expected) -> Iterator[Case]:
    """Each backend in turn; skipped where its library is not here, or does not take this GPU."""
    backend = str(request.param)
    try:
        if backend == "onnxruntime":
            if problem := cuda_problem():
                raise BackendMissing(problem)
            words = ["--device", "cuda"]
        else:
            load_library(backend)
            words = ["--backend", backend]
        if main(["build", str(gpu_bundle), *words]) != 0:
            raise BackendError(f"{backend} does not build for this GPU; its reason stands above")
    except BackendMissing as error:
        pytest.skip(str(error))
    except BackendError as error:
        if backend != "tensorrt-rtx":
            raise
        pytest.skip(str(error))  # it serves RTX and workstation GPUs alone
    texts, pictures, vectors = expected
    yield Case(backend, gpu_bundle, texts, pictures, vectors)
