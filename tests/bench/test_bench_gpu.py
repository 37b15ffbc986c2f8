"""The suite for GPUs, as far as it can be held to something without one: torch's towers, counts, stages, bounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jinaclip.backends.cuda.gpu import Gpu, driver_problem
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCuda
from jinaclip.backends.onnxruntime.cuda_provider import cuda_problem
from jinaclip.backends.tensorrt.backend import TensorRtBackend
from jinaclip.backends.tensorrt.library import Library
from jinaclip.bundle.manifest import Bundle
from jinaclip.cli import main
from jinaclip.errors import BackendMissing
from jinaclip.preprocessing.image import normalise
from jinaclip_bench.cases.gpu_backends import backends_on_gpu
from jinaclip_bench.cases.settings import BenchSettings, OpenCase
from jinaclip_bench.cases.table import CASES, ON_GPU, SUITES, Case, random_ids
from jinaclip_bench.errors import BenchError, NotCompiled
from jinaclip_bench.measuring.device_profile import DEVICE_STAGES, UNAVAILABLE, stages_of
from jinaclip_bench.measuring.machine import gpu_versions
from jinaclip_bench.measuring.timing import Sample, jinaclip_side, precision_of
from jinaclip_bench.reporting.bounds import BOUNDS, TORCHS_BEST, Bound
from jinaclip_bench.reporting.record import FIELDS, SCHEMA, SINCE, records_of, run_fields, to_line
from jinaclip_bench.reporting.report import read_records, render
from jinaclip_bench.run import measure as measure_case
from jinaclip_bench.run import run_cases
from jinaclip_bench.scenarios.flops import flops_of_images, flops_of_texts
from jinaclip_bench.scenarios.in_process import KINDS
from jinaclip_bench.sides.random_model import cached_model
from jinaclip_bench.sides.torch_cuda import compile_problem, require_torch_cuda, unpadded
from jinaclip_bench.sides.torch_forwards import image_forwards, text_forwards
from jinaclip_bench.sides.torch_towers import (
    ImagesOfPixels,
    TextsOfIds,
    TextsWithoutPadding,
    jagged_attention,
    rotate,
    varlen_attention,
)
from jinaclip_bench.sides.torch_towers import without_padding as quickest_without_padding
from jinaclip_export.checkpoint.reader import Checkpoint
from jinaclip_export.towers.image import ImageTower
from jinaclip_export.towers.text import TextTower

Records = list[dict[str, Any]]
GPU = Gpu(index=0, name="Some GPU", capability="9.0", sm_count=132, memory_mib=143_771, driver="13.0")
without_a_gpu = pytest.mark.skipif(driver_problem() is None, reason="there is a GPU here")


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint: Path) -> Checkpoint:
    return Checkpoint(small_checkpoint)


@pytest.fixture(scope="module")
def bundle(small_bundle: Path) -> Bundle:
    return Bundle(small_bundle)


@pytest.fixture(scope="module")
def text(checkpoint: Checkpoint) -> TextTower:
    return checkpoint.text_tower()


@pytest.fixture(scope="module")
def image(checkpoint: Checkpoint) -> ImageTower:
    return checkpoint.image_tower()


@pytest.fixture
def padded_ids(bundle: Bundle) -> np.ndarray:
    """int64 [5, 40]: rows of 40, 3, 17, 40 and 26 tokens."""
    ids = random_ids(bundle, 5, 40)
    for row, length in enumerate((40, 3, 17, 40, 26)):
        ids[row, length - 1] = bundle.special_ids["eos"]
        ids[row, length:] = bundle.special_ids["pad"]
    return ids


@pytest.fixture
def pixels(bundle: Bundle) -> np.ndarray:
    """uint8 [2, S, S, 3]."""
    size = bundle.preprocessing.size
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)


def images_of_pixels(image: ImageTower, bundle: Bundle) -> ImagesOfPixels:
    mean, std = (torch.tensor(v)[:, None, None] for v in (bundle.preprocessing.mean, bundle.preprocessing.std))
    return ImagesOfPixels(image, mean, std)


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference of the unit vectors."""
    return float((F.normalize(one, dim=-1) - F.normalize(other, dim=-1)).abs().max())


# Torch's towers


@torch.inference_mode()
def test_the_padded_texts_are_the_towers(text: TextTower, padded_ids: np.ndarray) -> None:
    ids, full = torch.from_numpy(padded_ids), torch.from_numpy(padded_ids[:1])
    assert apart(TextsOfIds(text)(ids, True), text(ids)) <= 1e-5
    assert apart(TextsOfIds(text)(full, False), text(full)) <= 1e-5
    assert apart(TextsOfIds(text)(ids, False), text(ids)) > 1e-3  # the mask is needed


# On a CPU the older, strided kind of nested tensors stands behind the jagged ones, and says that it is a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@torch.inference_mode()
def test_texts_without_padding_are_the_towers(text: TextTower, bundle: Bundle, padded_ids: np.ndarray) -> None:
    ids, positions, rows, offsets, longest = unpadded(padded_ids, bundle.special_ids["pad"])
    tensors = [torch.from_numpy(array) for array in (ids, positions, rows, offsets)]
    found = TextsWithoutPadding(text, jagged_attention)(*tensors, longest)
    assert len(ids) == 40 + 3 + 17 + 40 + 26 and found.dtype == torch.float32
    assert apart(found, text(torch.from_numpy(padded_ids))) <= 1e-5
    assert apart(found, TextsOfIds(text)(torch.from_numpy(padded_ids), True)) <= 1e-5
    nowhere = torch.zeros_like(tensors[1])
    assert apart(TextsWithoutPadding(text, jagged_attention)(tensors[0], nowhere, *tensors[2:], longest), found) > 1e-3

    def as_one_text(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        return jagged_attention(q, k, v, offsets[[0, -1]], len(q))

    assert apart(TextsWithoutPadding(text, as_one_text)(*tensors, longest), found) > 1e-3


def test_ids_without_their_padding() -> None:
    ids, positions, rows, offsets, longest = unpadded(np.array([[0, 5, 2, 1], [0, 2, 1, 1], [0, 5, 6, 2]]), pad=1)
    assert ids.tolist() == [0, 5, 2, 0, 2, 0, 5, 6, 2]
    assert positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3] and rows.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert offsets.tolist() == [0, 3, 5, 9] and offsets.dtype == np.int32 and longest == 4


@torch.inference_mode()
def test_the_images_are_the_towers(image: ImageTower, bundle: Bundle, pixels: np.ndarray) -> None:
    expected = image(torch.from_numpy(normalise(pixels, bundle.preprocessing)))
    assert apart(images_of_pixels(image, bundle)(torch.from_numpy(pixels)), expected) <= 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_the_operators(interleaved: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    expected = torch.onnx.ops.rotary_embedding(
        x, angle.cos(), angle.sin(), torch.arange(5).expand(2, 5), interleaved=interleaved
    )
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin(), interleaved=interleaved), expected)


def test_torch_compile_sees_through_both_towers(
    text: TextTower, image: ImageTower, bundle: Bundle, padded_ids: np.ndarray, pixels: np.ndarray
) -> None:
    """One graph each, without a break: what the compiled sides ask for."""
    whole: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": "eager"}
    sides: list[tuple[torch.nn.Module, tuple[Any, ...]]] = [
        (TextsOfIds(text), (torch.from_numpy(padded_ids), True)),
        (images_of_pixels(image, bundle), (torch.from_numpy(pixels),)),
    ]
    for forward, arguments in sides:
        with torch.inference_mode():
            assert apart(torch.compile(forward, **whole)(*arguments), forward(*arguments)) <= 1e-5
    torch.compiler.reset()


def count_compiles(monkeypatch: pytest.MonkeyPatch) -> tuple[CompileCounterWithBackend, list[str | None]]:
    """Graphs that torch.compile makes from now on, by a backend that needs no C compiler; and the modes asked for."""
    backend, modes, compile_ = CompileCounterWithBackend("aot_eager"), list[str | None](), torch.compile

    def counting(forward: torch.nn.Module, *, mode: str | None, **options: Any) -> Any:
        modes.append(mode)
        return compile_(forward, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", counting)
    torch.compiler.reset()
    return backend, modes


@pytest.fixture
def varlen_on_a_cpu() -> None:
    """torch's own operator for rows of their own lengths, with a kernel for CPUs behind it."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 or newer has it")

    def kernel(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        result = torch.empty_like(q)
        for start, end in pairwise(offsets.tolist()):
            query, key, value = (t[start:end].transpose(0, 1) for t in (q, k, v))
            result[start:end] = F.scaled_dot_product_attention(query, key, value).transpose(0, 1)
        return result, torch.empty(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    varlen._varlen_attn.register_kernel("cpu")(kernel)


def texts_of_shape(bundle: Bundle, rows: int, tokens: int) -> np.ndarray:
    """int64 [rows, tokens], all but the first text with padding."""
    ids = random_ids(bundle, rows, tokens)
    for row, length in enumerate(np.random.default_rng(rows).integers(2, tokens, rows - 1), 1):
        ids[row, length - 1] = bundle.special_ids["eos"]
        ids[row, length:] = bundle.special_ids["pad"]
    return ids


@pytest.mark.usefixtures("varlen_on_a_cpu")
@torch.inference_mode()
def test_texts_of_all_shapes_share_one_compiled_graph(
    text: TextTower, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded and without padding; else a benchmark of mixed lengths would measure the compiler."""
    backend, modes = count_compiles(monkeypatch)
    forwards = text_forwards(text, varlen_attention, compiles=True)
    assert set(forwards) == {
        "torch-fp16", "torch-fp16-compiled", "torch-fp16-compiled-graph", "torch-fp16-unpadded",
        "torch-fp16-unpadded-compiled",
    }  # fmt: skip
    assert modes == [None] * 3
    for shape in ((5, 40), (5, 33), (8, 40), (33, 34), (40, 40), (64, 21), (2, 90), (3, 3)):
        padded = texts_of_shape(bundle, *shape)
        *arrays, longest = unpadded(padded, bundle.special_ids["pad"])
        tensors = [torch.from_numpy(array) for array in arrays]
        expected = text(torch.from_numpy(padded))
        assert apart(forwards["torch-fp16-compiled"](torch.from_numpy(padded), True), expected) <= 1e-5
        for name in ("torch-fp16-unpadded", "torch-fp16-unpadded-compiled"):
            assert apart(forwards[name](*tensors, longest), expected) <= 1e-5
    assert backend.frame_count == 2
    assert "torch-fp16-unpadded-compiled" not in text_forwards(text, jagged_attention, compiles=True)
    assert set(text_forwards(text, varlen_attention, compiles=False)) == {"torch-fp16", "torch-fp16-unpadded"}
    torch.compiler.reset()


@torch.inference_mode()
def test_the_ways_of_images(
    image: ImageTower, bundle: Bundle, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, modes = count_compiles(monkeypatch)
    forward = images_of_pixels(image, bundle)
    found = image_forwards(forward, compiles=True, max_autotune=True)
    assert list(found) == ["torch-fp16", "torch-fp16-compiled", "torch-fp16-compiled-graph", "torch-fp16-max-autotune"]
    assert modes == [None, "max-autotune-no-cudagraphs"]
    expected = image(torch.from_numpy(normalise(pixels, bundle.preprocessing)))
    assert all(apart(way(torch.from_numpy(pixels)), expected) <= 1e-5 for way in found.values())
    assert backend.frame_count == 1  # without the modes, which this backend has not, all are one
    assert list(image_forwards(forward, compiles=True)) == list(found)[:3]
    assert list(image_forwards(forward, compiles=False, max_autotune=True)) == ["torch-fp16"]
    torch.compiler.reset()


# Torch's compiler warns of its own modules and settings.
@pytest.mark.filterwarnings("ignore")
def test_a_torch_compile_that_does_not_work_is_told_in_one_line() -> None:
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}):
        problem = compile_problem(torch.device("cpu"))
    assert problem is not None and "no-such-compiler" in problem and "\n" not in problem
    torch.compiler.reset()


# Counts


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return int(counter.get_total_flops())


def test_operations_are_those_that_torch_counts(
    text: TextTower, image: ImageTower, bundle: Bundle, checkpoint: Checkpoint, pixels: np.ndarray
) -> None:
    ids = torch.from_numpy(random_ids(bundle, 3, 50))
    assert flops_of_texts(bundle.tower("text"), [50] * 3) == counted(lambda: TextsOfIds(text)(ids, False))
    forward = images_of_pixels(image, bundle)
    expected = counted(lambda: forward(torch.from_numpy(pixels)))
    assert flops_of_images(bundle.tower("image"), 2, checkpoint.config.image) == expected


def test_padding_is_no_work(bundle: Bundle) -> None:
    tower = bundle.tower("text")
    one, other = flops_of_texts(tower, [10]), flops_of_texts(tower, [90])
    assert flops_of_texts(tower, [10, 90]) == one + other < flops_of_texts(tower, [90, 90])
    assert other > 9 * one  # attention grows with the square


# Stages


def test_stages_of_what_the_device_did() -> None:
    events = [
        ("Memcpy HtoD (Pinned -> Device)", 1.0, 1.5),
        ("Memset (Device)", 1.5, 1.6),
        ("void flash_fwd_kernel<…>", 2.0, 3.0),
        ("Memcpy DtoD (Device -> Device)", 3.0, 3.5),
        ("gemm", 3.5, 4.25),
        ("Memcpy DtoH (Device -> Pinned)", 4.25, 4.5),
        ("Memcpy DtoH (Device -> Pinned)", 5.0, 5.5),
    ]
    assert stages_of(events) == {"copy in": 0.5, "run": 2.25, "copy out": 0.75}
    assert stages_of(events[2:5]) == {"copy in": None, "run": 2.25, "copy out": None}
    assert stages_of([]) == stages_of(events[:2]) == UNAVAILABLE


@pytest.mark.parametrize("tower", ["text", "image"])
def test_stages_on_a_cpu_tell_the_host_alone(tower: str, bundle: Bundle) -> None:
    settings = BenchSettings(bundle, None, threads=1, repeats=2)
    (found,) = measure_case(CASES[f"stages-{tower}"], settings, {}, run_fields(bundle))
    host = {"text": "tokenise", "image": "decode and resize"}[tower]
    assert list(found["stages_ms"]) == [host, "session", *DEVICE_STAGES]
    assert found["stages_ms"][host] > 0 and found["stages_ms"]["session"] > 0 and found["first_call_ms"] > 0
    assert [found["stages_ms"][name] for name in DEVICE_STAGES] == [None] * 3 and found["device_ms"] is None
    table = render([found]).split("\n\n")[-1].splitlines()
    titles, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (table[0], table[2]))
    assert titles == ["case", "implementation", "n", "p50 ms", f"{host} ms", "session ms", "copy in ms", "run ms",
                      "copy out ms", "first call ms"]  # fmt: skip
    assert cells[6:9] == ["not available"] * 3


# Sides, records, bounds


def settings_on_gpu(bundle: Bundle, checkpoint: Checkpoint | None = None) -> BenchSettings:
    backend = OnnxRuntimeCuda(GPU)
    return BenchSettings(
        bundle, checkpoint, threads=4, repeats=2, precisions=("fp16",), suite="gpu", backends=(backend,)
    )


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("image-1", ["torch-fp16", "torch-fp16-compiled-graph"]),
        ("image-32", ["torch-fp16", "torch-fp16-compiled", "torch-fp16-max-autotune"]),
    ],
)
def test_which_of_torchs_sides_a_case_has(
    case: str, expected: list[str], bundle: Bundle, checkpoint: Checkpoint
) -> None:
    names = ("torch-fp16", "torch-fp16-compiled", "torch-fp16-compiled-graph", "torch-fp16-max-autotune")
    settings = BenchSettings(bundle, checkpoint, threads=1, repeats=1)
    with KINDS["graph"](CASES[case], settings, {name: lambda values: values for name in names}) as opened:
        assert list(opened.sides) == ["jinaclip fp32", *expected]


def test_a_side_that_does_not_compile_is_left_out_and_told(
    precise_bundle: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And each round has a rate of its own, measured behind it."""
    order: list[str] = []

    def side(name: str, seconds: float) -> Callable[[], Sample]:
        def call() -> Sample:
            order.append(name)
            if "compiled" in name:
                raise NotCompiled(f"torch.compile cannot compile {name}: no kernel")
            return Sample(seconds, np.eye(1))

        return call

    def rate() -> float:
        order.append("rate")
        return 1000.0 / order.count("rate")

    names = ("jinaclip fp16 tensorrt", "torch-fp16", "torch-fp16-compiled")

    @contextmanager
    def kind(case: Case, settings: BenchSettings, torch: Any) -> Iterator[OpenCase]:
        sides = {name: side(name, 0.1) for name in names}
        yield OpenCase(sides, (32,), tokens=None, burn_in=2, flops=10**13, matmul_tflops=rate)

    monkeypatch.setitem(KINDS, "graph", kind)
    settings = settings_on_gpu(Bundle(precise_bundle), checkpoint)
    records = measure_case(CASES["image-32"], settings, {}, run_fields(settings.bundle, "gpu", settings.backends))
    assert [record["side"] for record in records] == list(names[:2])
    assert order == [*names, *names[:2], *[*names[:2], "rate"] * 2]
    assert records[0]["matmul_tflops"] == 750.0 and records[0]["matmul_share"]["p50"] == 0.15  # 0.1 and 0.2
    expected = "torch.compile cannot compile torch-fp16-compiled: no kernel; this side is skipped"
    assert caplog.messages == [expected]


def test_every_case_of_the_suite_can_be_opened() -> None:
    for name in SUITES["gpu"]:
        assert CASES[name].kind in ON_GPU and CASES[name].kind in KINDS
    measured = {bound.case for bound in BOUNDS if bound.suite == "gpu"}
    assert measured <= set(SUITES["gpu"])


def test_sides_carry_their_backend(precise_bundle: Path) -> None:
    settings = replace(settings_on_gpu(Bundle(precise_bundle)), precisions=("fp16", "fp32"))
    assert [name for name, _, _ in settings.jinaclip_sides("text")] == [
        "jinaclip fp16 onnxruntime",
        "jinaclip fp32 onnxruntime",
    ]
    assert [precision_of(name) for name, _, _ in settings.jinaclip_sides("image")] == ["fp16", "fp32"]
    on_cpu = BenchSettings(settings.bundle, None, threads=1, repeats=1, precisions=("fp32",))
    assert [name for name, _, _ in on_cpu.jinaclip_sides("text")] == ["jinaclip fp32"] and on_cpu.gpu is None
    assert settings.gpu == GPU


# What a run on a GPU would leave, in round numbers: ms by case and side.
TIMES = {
    "image-32": {
        "jinaclip fp16 onnxruntime": [50.0, 52.0],
        "jinaclip fp16 tensorrt": [40.0, 40.0],
        "torch-fp16": [80.0, 80.0],
        "torch-fp16-max-autotune": [60.0, 64.0],
        "torch-fp16-compiled": [50.0, 46.0],
    },
    "bulk-512": {"jinaclip fp16 tensorrt": [100.0, 100.0], "torch-fp16": [300.0, 300.0],
                 "torch-fp16-unpadded": [120.0, 120.0], "torch-fp16-unpadded-compiled": [90.0, 94.0]},
    "stages-text": {"jinaclip fp16 tensorrt": [2.0, 2.0]},
}  # fmt: skip
RATES = (800.0, 400.0)  # TFLOP/s of the rounds


@pytest.fixture(scope="module")
def sampled(precise_bundle: Path, checkpoint: Checkpoint) -> Records:
    """Records of TIMES, of an invented GPU."""
    bundle = Bundle(precise_bundle)
    settings = settings_on_gpu(bundle, checkpoint)
    facts = run_fields(bundle, "gpu", settings.backends)
    records: Records = []
    for case, times in TIMES.items():
        stages: dict[str, float | None] | None = None
        if case == "stages-text":
            stages = {"tokenise": 0.0002, "session": 0.0016, "copy in": None, "run": 0.0009, "copy out": 0.00001}
        samples = {
            side: [Sample(ms / 1e3, np.eye(1), device_s=ms / 2e3, stages=stages) for ms in milliseconds]
            for side, milliseconds in times.items()
        }
        cosines = {
            (side, mine): 0.999 for side in times for mine in times if mine.startswith("jinaclip") and side != mine
        }
        opened = OpenCase(
            {}, (32,), tokens=None if case == "image-32" else 640, flops=20 * 10**12,
            first_calls={"jinaclip fp16 tensorrt": 0.25} if stages else {},
        )  # fmt: skip
        rates = () if stages else RATES
        records += records_of(CASES[case], opened, settings, samples, cosines, facts, rates)
    return records


def test_records_of_a_gpu(sampled: Records, tmp_path: Path) -> None:
    by_side = {(record["case"], record["side"]): record for record in sampled}
    ours_ = by_side["image-32", "jinaclip fp16 tensorrt"]
    assert ours_["tflops"] == 500.0 and ours_["matmul_tflops"] == 600.0
    assert ours_["matmul_share"] == {"p50": 0.9375, "p10": 0.6875, "p90": 1.1875}  # 500 ÷ 800 and 500 ÷ 400
    assert by_side["bulk-512", "torch-fp16"]["matmul_share"]["p10"] < 0.1
    assert by_side["stages-text", "jinaclip fp16 tensorrt"]["matmul_share"] is None
    assert ours_["device_ms"]["p50"] == 20.0 and ours_["items_per_s"] == 800.0 and ours_["precision"] == "fp16"
    assert ours_["provenance"].startswith("jc1-") and by_side["image-32", "torch-fp16"]["provenance"] is None
    assert ours_["machine"]["gpu"] == {
        "name": "Some GPU", "capability": "9.0", "sm_count": 132, "memory_mib": 143_771,
    }  # fmt: skip
    assert ours_["versions"]["cuda"] == "13.0" and ours_["first_call_ms"] is None and ours_["stages_ms"] is None
    staged = by_side["stages-text", "jinaclip fp16 tensorrt"]
    assert staged["first_call_ms"] == 250.0
    assert staged["stages_ms"] == {"tokenise": 0.2, "session": 1.6, "copy in": None, "run": 0.9, "copy out": 0.01}
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(to_line(record) + "\n" for record in sampled), "utf-8")
    assert read_records(path) == sampled and all(list(record) == list(FIELDS) for record in sampled)


def test_the_report_of_a_gpu_ends_with_its_bounds(sampled: Records) -> None:
    facts, steady, stages, bounds = render(sampled).split("\n\n")
    assert facts.startswith("Some GPU (capability 9.0, 132 SMs, 143,771 MiB), ") and "cuda 13.0" in facts
    assert "device ms" in steady and "share of matmul" in steady and "TFLOP/s" in steady
    assert "not available" in stages and "first call ms" in stages
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in bounds.splitlines())
    assert titles == ["case", "figure", "bound", "target", "measured (p10 … p90)", "compared", "verdict"]
    assert rows[0] == [
        "image-32", "torch's best ÷ jinaclip fp16", "≥ 1.00", "≥ 1.30", "1.20 (1.16 … 1.24)",
        "torch-fp16-compiled ÷ jinaclip fp16 tensorrt", "holds, target missed",
    ]  # fmt: skip
    assert rows[1] == [
        "image-32", "jinaclip fp16, share of the matmul rate", "≥ 0.45", "≥ 0.60", "0.94 (0.69 … 1.19)",
        "jinaclip fp16 tensorrt", "holds, target met",
    ]  # fmt: skip
    assert rows[2][2:] == [
        "≥ 1.20", "≥ 1.50", "0.92 (0.90 … 0.94)", "torch-fp16-unpadded-compiled ÷ jinaclip fp16 tensorrt",
        "MISSED, target missed",
    ]  # fmt: skip
    verdicts = {row[0]: row[-1] for row in rows[3:]}
    assert verdicts == {
        "bulk-2048": "not measured",
        "stages-image": "not measured",
        "stages-text": "holds, target missed",
    }
    assert len(rows) == sum(bound.suite == "gpu" for bound in BOUNDS)


def test_torchs_best_is_the_fastest_of_torchs(sampled: Records) -> None:
    bound = Bound("gpu", "image-32", "fp16", TORCHS_BEST, 1.0)
    without_compile = [record for record in sampled if "compiled" not in record["side"]]
    found = bound.measured(without_compile)
    assert found is not None and found.sides == "torch-fp16-max-autotune ÷ jinaclip fp16 tensorrt"
    assert bound.measured([record for record in sampled if "torch" not in record["side"]]) is None
    assert replace(bound, precision="fp32").measured(sampled) is None


@pytest.mark.parametrize("schema", [version - 1 for version in SINCE])
def test_lines_of_older_schemas_are_still_read(schema: int, sampled: Records, tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    newer = {name for since, names in SINCE.items() if since > schema for name in names}
    old = {name: value for name, value in sampled[0].items() if name not in newer} | {"schema": schema}
    path.write_text(json.dumps(old) + "\n", "utf-8")
    (found,) = read_records(path)
    assert all(found[name] is None for name in newer) and found.keys() == FIELDS.keys()
    assert found["schema"] == SCHEMA and found["p50"] == old["p50"]
    path.write_text(json.dumps(old | {"schema": schema + 1}) + "\n", "utf-8")
    with pytest.raises(BenchError, match=f"line 1 is not a record of schema {SCHEMA}"):
        read_records(path)


def test_versions_of_the_driver(tmp_path: Path) -> None:
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\nGCC version: gcc 13\n"
    (tmp_path / "driver/nvidia/version").write_text(line)
    assert gpu_versions(GPU, tmp_path) == {"driver": "570.86.15", "cuda": "13.0"}
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\n"
    (tmp_path / "driver/nvidia/version").write_text(line)
    assert gpu_versions(GPU, tmp_path)["driver"] == "575.57.08"
    assert gpu_versions(GPU, tmp_path / "none")["driver"] is None


def test_the_models_of_cpu_and_gpu_lie_apart() -> None:
    assert cached_model("small").name + "-cuda" == cached_model("small", device="cuda").name


# What is refused


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@without_a_gpu
@pytest.mark.parametrize(
    "words",
    [
        ["--suite", "gpu"],
        ["--suite", "gpu", "--device", "cuda:3", "--backend", "tensorrt"],
        ["--cases", "image-1", "--device", "cuda"],
    ],
)
def test_without_a_gpu_nothing_is_made_or_measured(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["bench", "run", *words]) == 1
    assert (driver_problem() or "") in one_line(capsys) and not list(tmp_path.iterdir())


@without_a_gpu
def test_a_torch_without_cuda_is_named() -> None:
    with pytest.raises(BenchError, match=r"torch .* (was built without CUDA|sees no GPU), so torch cannot"):
        require_torch_cuda(0)


@without_a_gpu
def test_places_say_what_is_missing(bundle: Bundle) -> None:
    for backend in (None, "onnxruntime", "tensorrt"):
        with pytest.raises(BackendMissing, match=r"NVIDIA driver"):
            backends_on_gpu(bundle, ["text"], "cuda", backend)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "gpu", "--device", "cpu"], "--suite gpu needs a GPU; use --device cuda or cuda:N"),
        (["--suite", "cpu", "--backend", "tensorrt"], "--backend can only be used on a GPU; use --device"),
        (["--suite", "gpu", "--backend", "auto"], "invalid choice: 'auto'"),
        (["--suite", "cpu", "--max-autotune"], "needs the case image-32 on a GPU; use --suite"),
        (["--cases", "image-1", "--device", "cuda", "--max-autotune"], "needs the case image-32 on a GPU; use --suite"),
        (["--suite", "cpu", "--device", "cuda"], "text-query can only be measured on the CPU; remove it"),
        (["--cases", "image-1,process-image", "--device", "cuda:1"], "process-image can only be measured on the CPU"),
    ],
)
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["bench", "run", *words])
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_place_that_runs_none_of_the_precisions_is_refused(precise_bundle: Path) -> None:
    settings, written = settings_on_gpu(Bundle(precise_bundle)), list[dict[str, Any]]()
    plans_alone = replace(
        settings, precisions=("fp32",), backends=(TensorRtBackend("tensorrt", GPU, Library("tensorrt", None, "11")),)
    )
    with pytest.raises(BenchError, match="tensorrt cannot run the text tower in fp32; remove --precision"):
        run_cases(["text-1x32"], plans_alone, written.append)
    assert not written


# With a GPU


@pytest.mark.gpu
@torch.inference_mode()
def test_flash_attention_without_padding_is_the_towers(
    text: TextTower, checkpoint: Checkpoint, bundle: Bundle, padded_ids: np.ndarray
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    expected = text(torch.from_numpy(padded_ids))
    *arrays, longest = unpadded(padded_ids, bundle.special_ids["pad"])
    tensors = [torch.from_numpy(array).cuda() for array in arrays]
    half = checkpoint.text_tower().to("cuda", torch.float16)
    for attention in (quickest_without_padding(), jagged_attention):
        assert apart(TextsWithoutPadding(half, attention)(*tensors, longest).cpu(), expected) < 0.02


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's compiler and profiler warn of what is theirs
def test_the_suite_on_the_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if problem := driver_problem() or cuda_problem():
        pytest.skip(problem)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    output = tmp_path / "gpu.jsonl"
    command = ["bench", "run", "--suite", "gpu", "--random", "small", "--backend", "onnxruntime", "--repeats", "2"]
    assert main([*command, "--output", str(output)]) == 0
    records = read_records(output)
    assert list(dict.fromkeys(record["case"] for record in records)) == list(SUITES["gpu"])
    for record in records:
        assert record["machine"]["gpu"]["name"] and record["versions"]["cuda"]
        staged = record["case"].startswith("stages-")
        assert (record["device_ms"] is not None) == (staged or record["side"] != jinaclip_side("fp16", "onnxruntime"))
        assert (record["matmul_share"] is None) == staged
    assert "not measured" not in capsys.readouterr().out
