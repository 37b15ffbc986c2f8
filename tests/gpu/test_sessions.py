"""Every backend on the GPU that is here: the CPU's vectors, whatever runs beside them, for as long as one likes."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from jinaclip import ClipModel
from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.onnxruntime.cuda_placement import host_operators
from jinaclip.backends.shapes import Profile
from jinaclip.backends.tensorrt.engine import Plan
from jinaclip.backends.tensorrt.library import load_library
from jinaclip.backends.tensorrt.session import TensorRTSession
from jinaclip.errors import BackendError, BackendMissing, InputError
from jinaclip_engines.graph import constant, read, write
from jinaclip_engines.passes.tensorrt import for_tensorrt
from jinaclip_engines.tensorrt.compiler import compile_plan
from tests.gpu.conftest import Case

pytestmark = pytest.mark.gpu
ENOUGH = 0.9999  # cosine of fp16 with fp32: the bound of its certificate


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found: np.ndarray = (a * b).sum(-1)
    return found


def session_of(model: ClipModel, tower: str) -> Any:
    return model.encoders[tower].session


def free_memory() -> int:
    from jinaclip.backends.cuda.api import Cuda

    return Cuda(0).free_bytes()


def test_vectors_are_the_cpus(case: Case) -> None:
    with case.open() as model:
        assert cosines(model.encode_text(case.texts), case.expected["text"]).min() >= ENOUGH
        assert cosines(model.encode_image(case.pictures), case.expected["image"]).min() >= ENOUGH
        towers = model.info()["towers"]
        for tower in ("text", "image"):
            facts = towers[tower]
            assert (facts["backend"], facts["device"], facts["precision"]) == (case.backend, "cuda", "fp16")
            assert facts["self_test"]["ratio"] <= 0.02 and facts["prepared"].startswith(f"{tower}-fp16-{case.backend}-")


def test_a_row_does_not_depend_on_its_batch(case: Case) -> None:
    """Alone, together, and beside a long text of rare pieces: the certificate's bound beside an outlier."""
    hostile = "\U0001f600龘 ¶¶¶ ZZZZ " * 30
    with case.open() as model:
        alone = np.stack([model.encode_text(text) for text in case.texts[:14]])
        beside = np.stack([model.encode_text([text, hostile], batch_size=2)[0] for text in case.texts[:14]])
        assert cosines(alone, beside).min() >= 0.99999
        alone = np.stack([model.encode_image(picture) for picture in case.pictures])
        together = model.encode_image(case.pictures, batch_size=len(case.pictures))
        assert cosines(alone, together).min() >= 0.99999


def test_the_same_input_gives_the_same_vector(case: Case) -> None:
    """First run, captured run, replay, and replays with other shapes between them."""
    with case.open() as model:
        first: dict[str, np.ndarray] = {}
        for _ in range(4):
            for count in (1, 3, 8):
                texts = model.encode_text(case.texts[:count], batch_size=count)
                pictures = model.encode_image(case.pictures[: min(count, 4)], batch_size=4)
                for name, found in ((f"text {count}", texts), (f"image {count}", pictures)):
                    assert np.abs(found - first.setdefault(name, found)).max() <= 1e-6, name
        if case.backend != "tensorrt-rtx":  # which captures by itself and does not say
            assert session_of(model, "text").graphs() > 0


def test_nothing_runs_on_the_host_in_silence(case: Case) -> None:
    """Placement is read from ONNX Runtime itself: reckoning with shapes may stay beside the host, work may not."""
    if case.backend != "onnxruntime":
        pytest.skip("an engine has no other device")
    with case.open() as model:
        for tower in ("text", "image"):
            inner = session_of(model, tower)._session
            assert inner.get_providers()[0] == "CUDAExecutionProvider" and host_operators(inner) == {}


def test_a_thousand_calls_leave_nothing_behind(case: Case) -> None:
    with case.open() as model:

        def call(number: int) -> None:
            model.encode_text(case.texts[number % 14], batch_size=1)
            if number % 10 == 0:
                model.encode_image(case.pictures[number % 5])

        for number in range(200):  # every shape has its kernels and graph
            call(number)
        device, host = free_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(1000):
            call(number)
        assert device - free_memory() <= 16 << 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - host <= 64 << 10  # KiB


def test_memory_comes_back(case: Case) -> None:
    with case.open() as model:  # what the libraries take once for the process
        model.encode_text("a")
    before = free_memory()
    for _ in range(3):
        with case.open() as model:
            model.encode_text("a")
    assert before - free_memory() <= 64 << 20


def test_threads_get_their_own_vectors(case: Case) -> None:
    with case.open() as model, ThreadPoolExecutor(8) as pool:

        def encode(number: int) -> float:
            start = number % len(case.texts)
            part = slice(start, start + 1 + number % 5)
            found = cosines(model.encode_text(case.texts[part]), case.expected["text"][part]).min()
            if number % 7 == 0:
                index = number % len(case.pictures)
                picture = model.encode_image(case.pictures[index])
                found = min(found, float(picture @ case.expected["image"][index]))
            return float(found)

        assert min(pool.map(encode, range(400))) >= ENOUGH


def test_batches_of_any_size(case: Case) -> None:
    """More rows than a profile or a graph holds run in parts."""
    with case.open() as model:
        texts = (case.texts * 8)[:150]
        expected = np.concatenate([case.expected["text"]] * 8)[:150]
        assert cosines(model.encode_text(texts, batch_size=150), expected).min() >= ENOUGH
        pictures = (case.pictures * 7)[:40]
        expected = np.concatenate([case.expected["image"]] * 7)[:40]
        assert cosines(model.encode_image(pictures, batch_size=40), expected).min() >= ENOUGH


def test_long_texts(case: Case) -> None:
    long = " ".join(case.texts * 40)
    with ClipModel(case.bundle, device="cpu", precision="fp32", towers=("text",)) as cpu, case.open() as model:
        for length in (300, 1000, 3000):
            expected = cpu.encode_text(long, max_length=length)
            assert float(model.encode_text(long, max_length=length) @ expected) >= ENOUGH


def test_what_is_too_long_for_an_engine_is_said(case: Case) -> None:
    if case.backend == "onnxruntime":
        pytest.skip("it takes every length")
    with case.open(towers=("text",)) as model:
        session = session_of(model, "text")
        longest = max(profile.tokens[2] for profile in session.profiles)
        with pytest.raises(InputError, match=f"built for at most {longest}; pass max_length={longest}"):
            session.run({"input_ids": np.full((1, longest + 1), 5)})


def test_vectors_that_are_not_finite_are_refused(case: Case, device: Gpu, tmp_path: Path) -> None:
    """Told by the engine itself, on the device: an engine of weights that hold one NaN, past the self-test."""
    if case.backend == "onnxruntime":
        pytest.skip("its graphs have no such output; only the self-test checks for it")
    library = load_library(case.backend)
    model = read(case.bundle / "text-fp16.onnx")
    expected = for_tensorrt(model, "fp16-acc32", attention_operator=library.sums_attention_in_float32)
    last = [v for name, v in model.graph.initializers.items() if name.endswith("norm2.weight")][-1]
    values = constant(last).copy()
    values[3] = np.nan
    last.const_value = ir.tensor(values)
    write(model, tmp_path / "graph.onnx")
    profiles = (Profile("text", (1, 1, 4), (16, 16, 64)),)
    compiled = compile_plan(library, tmp_path / "graph.onnx", expected, "fp16-acc32", profiles)
    (tmp_path / "plan.engine").write_bytes(memoryview(compiled.plan))
    plan = Plan("spoiled", tmp_path / "plan.engine", profiles)
    session = TensorRTSession(plan, gpu=device, library=library, pad=1)
    with pytest.raises(BackendError, match=r"spoiled on .* returned NaN or infinity for row 0 of the batch"):
        session.run({"input_ids": np.array([[0, 5, 2]])})
    session.close()


def test_closed_forked_and_missing(case: Case, device: Gpu) -> None:
    model = case.open(towers=("text",))
    model.close()
    model.close()
    with pytest.raises(BackendError, match="closed"):
        model.encode_text("a")
    with pytest.raises(BackendMissing, match=r"there is no device cuda:99; available devices: cuda:0"):
        ClipModel(case.bundle, backend=case.backend, device="cuda:99", precision="fp16")


def test_auto_takes_the_gpu(case: Case, gpu_bundle: Path) -> None:
    with ClipModel(gpu_bundle, precision="fp16", towers=("text",)) as model:
        assert model.info()["towers"]["text"]["device"] == "cuda"
