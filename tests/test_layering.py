"""Who may import whom, what is public, and what is in the wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jinaclip

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "jinaclip": ROOT / "runtime/jinaclip",
    "jinaclip_engines": ROOT / "engines/jinaclip_engines",
    "jinaclip_export": ROOT / "export/jinaclip_export",
    "jinaclip_bench": ROOT / "bench/jinaclip_bench",
}
# A package imports itself and those before it.
ORDER = list(PACKAGES)
# Inside the runtime: a module imports only those of earlier rows. A new module needs a row.
RUNTIME = [
    {"errors", "progress", "files"},
    {"image_sources", "text", "embeddings"},
    {"image"},
    {"manifest"},
    {"certificates", "engine_store"},
    {"machine", "packed_texts", "gpu", "gpu_thread", "buckets", "tensorrt_library", "cuda_libraries", "cuda_runtime"},
    {"cost", "onnxruntime_library"},
    {"base", "cuda", "pool", "tensorrt_engine", "packing"},
    {"staging", "cuda_operators", "cuda_provider", "tensorrt_worker"},
    {"tensorrt_session", "onnxruntime_cpu", "onnxruntime_cuda"},
    {"prepared", "plans"},
    {"selection"},
    {"selftest"},
    {"model"},
    {"server"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
# Libraries, by the only places that may import them.
CONFINED = {
    "onnxruntime": {"jinaclip/onnxruntime_library.py", "jinaclip_bench"},
    "tokenizers": {"jinaclip/text.py"},
    "starlette": {"jinaclip/server"},
    "uvicorn": {"jinaclip/server"},
    "orjson": {"jinaclip/server"},
    "pydantic": {"jinaclip/server"},
    "httpx": {"jinaclip/server/fetch.py"},
    "httpcore": {"jinaclip/server/fetch.py"},
    "prometheus_client": {"jinaclip/server"},
    "tensorrt": set(),  # by name, in jinaclip/tensorrt_library.py
    "tensorrt_rtx": set(),
    "cuda": {"jinaclip/cuda.py"},
    "PIL": {"jinaclip/image.py", "jinaclip/image_sources.py", "jinaclip/model.py", "jinaclip_export", "jinaclip_bench"},
    "pyarrow": {"jinaclip/cli/encode.py"},
    "torch": {"jinaclip_export", "jinaclip_bench"},
    "onnx": {"jinaclip_engines", "jinaclip_export", "jinaclip_bench"},
    "onnx_ir": {"jinaclip_engines"},
    "safetensors": {"jinaclip_export"},
    "huggingface_hub": {"jinaclip_export"},
    "skimage": {"jinaclip_export/certify_inputs.py"},
    "matplotlib": {"jinaclip_export/certify_plot.py"},
    "transformers": set(),
    "timm": set(),
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = [(name, path) for name, root in PACKAGES.items() for path in sorted(root.rglob("*.py"))]
IDS = [f"{name}/{path.relative_to(PACKAGES[name])}" for name, path in FILES]


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_imports_run_one_way(package: str, path: Path) -> None:
    later = ORDER[ORDER.index(package) + 1 :]
    for name in imports(path):
        assert name.split(".")[0] not in later, f"{path} imports {name}"
    where = f"{package}/{path.relative_to(PACKAGES[package])}"
    for name in {name.split(".")[0] for name in imports(path)} & CONFINED.keys():
        assert any(where == place or where.startswith(place + "/") for place in CONFINED[name]), f"{where}: {name}"


def runtime_module(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "jinaclip":
        return None
    return parts[1] if len(parts) > 1 and any(parts[1] in row for row in RUNTIME) else None


@pytest.mark.parametrize("path", sorted(PACKAGES["jinaclip"].rglob("*.py")), ids=str)
def test_runtime_modules_import_only_earlier_rows(path: Path) -> None:
    module = path.relative_to(PACKAGES["jinaclip"]).parts[0].removesuffix(".py")
    rows = [index for index, row in enumerate(RUNTIME) if module in row]
    assert rows, f"{module} has no row in the table"
    for name in imports(path):
        imported = runtime_module(name)
        if imported and imported != module:
            assert any(imported in row for row in RUNTIME[: rows[0]]), f"{module} imports {imported}"


def test_public_names() -> None:
    public = {name for name in vars(jinaclip) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(jinaclip, name)).__name__ == "module"}
    assert sorted(jinaclip.__all__) == jinaclip.__all__
    assert (public - modules - {"version"}) | {"__version__"} == set(jinaclip.__all__)


def test_every_error_is_in_the_tree() -> None:
    from jinaclip import errors

    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)}
    for cls in classes:
        assert issubclass(cls, errors.JinaClipError)
        assert cls.__name__ in (errors.__doc__ or ""), f"{cls.__name__} is not drawn"
        status, code = errors.status_of(cls("x"))
        assert status >= 400 and code.startswith("JINACLIP_ERROR")


def test_importing_the_package_is_light() -> None:
    script = (
        "import sys, jinaclip\n"
        "heavy = ('torch', 'onnx', 'onnxruntime', 'tokenizers', 'transformers', 'safetensors', 'pyarrow',\n"
        "         'tensorrt', 'tensorrt_rtx', 'cuda', 'starlette', 'uvicorn', 'pydantic', 'httpx')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_wheel_has_the_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    for name in (
        "jinaclip/py.typed",
        "jinaclip/cli/encode.py",
        "jinaclip_engines/tensorrt/profile-sets/server.toml",
        "jinaclip_export/cli.py",
        "jinaclip_export/certificate_texts.tsv",
    ):
        assert name in names
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert not any(name.endswith((".onnx", ".data", ".safetensors", ".engine", ".npz")) for name in names)


def test_no_file_names_this_machine() -> None:
    import re

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(/" + r"home/\w+|/" + r"root/|/" + r"Users/\w+|/" + r"tmp/\w+)")
    for name in tracked.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".jsonl", "") and path.is_file():
            assert not pattern.search(path.read_text("utf-8")), name
