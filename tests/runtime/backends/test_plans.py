"""Engines are held to what is here before anything of them is opened: each fact that differs is named, with the command
that builds them again. No GPU is needed for that; the engines are real ones, compiled ahead of time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jinaclip import ClipModel
from jinaclip.backends.cuda.gpu import Gpu, device_index, driver_problem, gpu, version_of
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu
from jinaclip.backends.selection import choose_backend, choose_precision
from jinaclip.backends.tensorrt.backend import TensorRtBackend
from jinaclip.backends.tensorrt.library import Library, load_library
from jinaclip.backends.tensorrt.plans import find_plan, gpu_difference
from jinaclip.bundle.manifest import Bundle
from jinaclip.cli import main
from jinaclip.errors import BackendError, BackendMissing, EngineMismatch, InputError

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: its packages are for Linux on x86-64")

L4 = Gpu(0, "NVIDIA L4", "8.9", 58, 22731, "13.0")
H200 = Gpu(0, "NVIDIA H200", "9.0", 132, 143771, "13.0")
no_gpu = pytest.mark.skipif(driver_problem() is None, reason="there is a GPU here")


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def built(precise_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(precise_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    assert main(["build", str(copy), "--backend", "tensorrt-rtx", "--target", "sm86,sm89", "--profile", "edge"]) == 0
    return copy


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def change(bundle: Path, tower: str, **values: Any) -> Path:
    (path,) = (bundle / "engines").glob(f"{tower}-*/engine.json")
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")
    return path.parent


def test_an_engine_that_fits_is_found(built: Path, library: Library) -> None:
    for tower in ("text", "image"):
        plan = find_plan(Bundle(built), tower, library, L4)
        assert plan.path.is_file() and plan.key.startswith(f"{tower}-fp16-tensorrt-rtx-")
        assert [profile.name for profile in plan.profiles] == ["edge"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": "1.6.0.1"}, "its version is '1.6.0.1', expected "),
        ({"graph": "0" * 16}, "its graph is '0000000000000000'"),
        ({"format_version": 2}, "its format_version is 2, expected 1"),
        ({"backend": "tensorrt"}, "its backend is 'tensorrt'"),
        ({"targets": ["sm120"]}, "it was compiled for sm120, this GPU is NVIDIA L4"),
        ({"targets": None, "gpu": {"name": "NVIDIA L40S"}}, r"its gpu is {'name': 'NVIDIA L40S'}, expected"),
        ({"profiles": []}, "lists no profile"),
        ({"profiles": [{"name": "a", "batch": [3, 2, 1], "tokens": None}]}, "its profiles cannot be read"),
        ({"files": {}}, "does not list plan.engine"),
        ({"files": {"plan.engine": {"bytes": 3, "sha256": ""}}}, "does not have 3 bytes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_fact_that_differs_is_named(bundle: Path, library: Library, values: dict[str, Any], message: str) -> None:
    directory = change(bundle, "text", **values)
    with pytest.raises(EngineMismatch, match=message) as caught:
        find_plan(Bundle(bundle), "text", library, L4)
    backend = values.get("backend", "tensorrt-rtx")
    command = f"jinaclip build {bundle} --backend {backend} --towers text --policy fp16-acc32 --profile edge"
    assert directory.name in str(caught.value) and command in str(caught.value)
    find_plan(Bundle(bundle), "image", library, L4)


def damaged_plan(directory: Path) -> None:
    content = bytearray((directory / "plan.engine").read_bytes())
    content[len(content) // 2] ^= 1
    (directory / "plan.engine").write_bytes(content)


DAMAGES: tuple[tuple[Callable[[Path], object], str], ...] = (
    (damaged_plan, "plan.engine does not have the sha256 that engine.json lists"),
    (lambda directory: (directory / "plan.engine").unlink(), "plan.engine is missing"),
    (lambda directory: (directory / "engine.json").write_text("{"), "its format_version is None"),
    (lambda directory: (directory / "engine.json").unlink(), "its format_version is None"),
)


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=["changed", "no-plan", "cut-sidecar", "no-sidecar"])
def test_a_damaged_engine_is_refused_unopened(
    bundle: Path, library: Library, damage: Callable[[Path], object], message: str
) -> None:
    """A plan is code: one changed byte and it is not handed to the library."""
    (directory,) = (bundle / "engines").glob("text-*")
    damage(directory)
    with pytest.raises(EngineMismatch, match=message):
        find_plan(Bundle(bundle), "text", library, L4)
    words = ["--target", "sm86,sm89", "--profile", "edge"]
    assert main(["build", str(bundle), "--backend", "tensorrt-rtx", "--towers", "text", *words]) == 0
    assert find_plan(Bundle(bundle), "text", library, L4).key == directory.name


def test_of_several_the_last_is_taken(bundle: Path, library: Library) -> None:
    first = find_plan(Bundle(bundle), "text", library, L4)
    words = ["--target", "sm89", "--towers", "text", "--policy", "fp16-fast", "--profile", "edge"]
    assert main(["build", str(bundle), "--backend", "tensorrt-rtx", *words]) == 0
    (second,) = (path for path in (bundle / "engines").glob("text-*") if path.name != first.key)
    for created, expected in (("2000", first.key), ("2100", second.name)):
        sidecar = json.loads((second / "engine.json").read_text("utf-8"))
        (second / "engine.json").write_text(json.dumps(sidecar | {"created": created}), "utf-8")
        assert find_plan(Bundle(bundle), "text", library, L4).key == expected
    damaged_plan(second)
    assert find_plan(Bundle(bundle), "text", library, L4).key == first.key


def test_none_is_built_when_a_model_is_opened(precise_bundle: Path, library: Library) -> None:
    with pytest.raises(BackendMissing, match="has no tensorrt-rtx engine for its text tower; build one") as caught:
        find_plan(Bundle(precise_bundle), "text", library, L4)
    assert f"jinaclip build {precise_bundle} --backend tensorrt-rtx --towers text" in str(caught.value)


def test_a_read_only_bundles_engines_lie_in_its_cache(precise_bundle: Path, tmp_path: Path, library: Library) -> None:
    command = ["build", str(precise_bundle), "--backend", "tensorrt-rtx", "--target", "sm89", "--towers", "image"]
    assert main([*command, "--cache", str(tmp_path)]) == 0
    assert find_plan(Bundle(precise_bundle, tmp_path), "image", library, L4).path.is_relative_to(tmp_path)
    with pytest.raises(BackendMissing):
        find_plan(Bundle(precise_bundle), "image", library, L4)


def test_an_engine_of_a_gpu_is_for_its_like_alone() -> None:
    sidecar = {"gpu": H200.facts(), "targets": None}
    assert gpu_difference(sidecar, H200) is None
    assert gpu_difference(sidecar, replace(H200, index=3, driver="13.1")) is None
    for other in (L4, replace(H200, sm_count=66), replace(H200, memory_mib=71000), replace(H200, name="NVIDIA H100")):
        assert "its gpu is" in (gpu_difference(sidecar, other) or "")


def test_a_precision_is_chosen_by_what_is_certified_for_the_engine(bundle: Path, library: Library) -> None:
    backend = TensorRtBackend("tensorrt-rtx", L4, library)
    opened = Bundle(bundle)
    assert backend.precisions(opened, "text") == ("fp16",) and backend.device == "cuda"
    with pytest.raises(BackendError, match=r"runs no fp32 graph of the text tower, and fp16: no certificate; pass"):
        choose_precision(opened, "text", backend)
    certificate = {
        "format_version": 1, "precision": "fp16", "session": backend.facts(),
        "towers": {"text": {"graph": backend.graph(opened, "text", "fp16"), "verdict": "passed"}},
    }  # fmt: skip
    assert opened.write_note("certificates/fp16-tensorrt-rtx-cuda.json", certificate)
    assert choose_precision(opened, "text", backend).precision == "fp16"
    for other in (replace(L4, name="NVIDIA L40S"), replace(L4, driver="12.8")):
        with pytest.raises(BackendError, match=r"certificate is for (gpu|driver)"):
            choose_precision(opened, "text", TensorRtBackend("tensorrt-rtx", other, library))
    change(bundle, "text", created="2001")
    assert choose_precision(opened, "text", backend).precision == "fp16"  # the same engine
    shutil.rmtree(bundle / "engines" / find_plan(opened, "text", library, L4).key)
    with pytest.raises(BackendError, match="has no tensorrt-rtx engine"):
        choose_precision(opened, "text", backend)


def test_an_engine_gives_its_own_precision_only(bundle: Path, library: Library) -> None:
    with pytest.raises(BackendMissing, match=r"runs fp16 of this bundle.s text tower, not fp32"):
        TensorRtBackend("tensorrt-rtx", L4, library).open(Bundle(bundle), "text", "fp32")


@no_gpu
def test_without_a_driver_nothing_of_tensorrt_is_touched(built: Path) -> None:
    """Constructing its objects without a driver can end the process: a new one, that must end with our error."""
    code = (
        "import sys; from jinaclip import ClipModel, BackendMissing\n"
        f"for backend in ('tensorrt', 'tensorrt-rtx'):\n"
        f"    try: ClipModel({str(built)!r}, backend=backend, precision='fp16')\n"
        "    except BackendMissing as error: print(error)\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('tensorrt', 'tensorrt_rtx', 'cuda')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["no NVIDIA driver was found (libcuda.so.1 is missing)"] * 2 + ["[]"]


@no_gpu
def test_auto_takes_the_cpu_where_there_is_no_gpu(built: Path) -> None:
    with ClipModel(built, towers=("text",)) as model:
        info = model.info()
        assert info["backend_reason"] == "no NVIDIA driver was found (libcuda.so.1 is missing)"
        assert (info["towers"]["text"]["backend"], info["towers"]["text"]["device"]) == ("onnxruntime", "cpu")
    assert choose_backend(Bundle(built), ("text",), device="cpu") == OnnxRuntimeCpu()
    with pytest.raises(BackendMissing, match="no NVIDIA driver"):
        gpu(0)
    assert main(["build", str(built), "--backend", "tensorrt"]) == 1


def test_devices_are_named_as_torch_names_them() -> None:
    assert (device_index("cuda"), device_index("cuda:0"), device_index("cuda:11")) == (0, 0, 11)
    for name in ("gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", ""):
        with pytest.raises(InputError, match="expected auto, cpu, cuda or cuda:N"):
            device_index(name)
    assert H200.sm == "sm90" and "index" not in H200.facts() and "driver" not in H200.facts()


def test_versions() -> None:
    assert [version_of(text) for text in ("11.4.0.106", "10.12", "1.7.1.116", "11", "")] == [
        (11, 4), (10, 12), (1, 7), (11, 0), (0, 0)
    ]  # fmt: skip
    real = load_library("tensorrt-rtx")
    assert real.sums_attention_in_float32
    for version, expected in (("10.16.1.11", False), ("11.2.0", False), ("11.3.0", True), ("11.4.0.106", True)):
        assert Library("tensorrt", real.module, version).sums_attention_in_float32 == expected
