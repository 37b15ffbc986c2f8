"""Who may import whom, what is public, and what is in the wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jinaclip

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "jinaclip": ROOT / "runtime/jinaclip",
    "jinaclip_engines": ROOT / "engines/jinaclip_engines",
    "jinaclip_export": ROOT / "export/jinaclip_export",
    "jinaclip_bench": ROOT / "bench/jinaclip_bench",
}
# A package imports itself and those before it.
ORDER = list(PACKAGES)
# Inside a folder: its files and folders, in rows. One imports those of earlier rows, and what its folder may import. A
# new file or folder needs a place here.
ROWS: dict[str, list[set[str]]] = {
    "jinaclip": [
        {"errors", "terminal"},
        {"preprocessing", "embeddings"},
        {"bundle"},
        {"backends"},
        {"packing"},
        {"encoders"},
        {"model"},
        {"server"},
        {"__init__"},
        {"cli"},
        {"__main__"},
    ],
    "jinaclip/preprocessing": [{"image_sources", "text"}, {"image"}],
    "jinaclip/bundle": [{"files"}, {"manifest"}, {"engines", "certificates"}],
    "jinaclip/backends": [
        {"machine", "shapes", "pool"},
        {"cost", "cuda"},
        {"base"},
        {"onnxruntime", "tensorrt"},
        {"selection", "self_test"},
    ],
    "jinaclip/backends/cuda": [{"gpu", "gpu_thread", "libraries", "runtime"}, {"api"}, {"staging"}],
    "jinaclip/backends/onnxruntime": [
        {"library", "packed_texts"},
        {"cpu", "cuda_provider", "cuda_operators", "cuda_runs"},
        {"cuda_placement", "prepared_graphs"},
        {"cuda"},
        {"backend"},
    ],
    "jinaclip/backends/tensorrt": [{"library"}, {"engine"}, {"worker"}, {"session"}, {"plans"}, {"backend"}],
    "jinaclip/server": [
        {"errors", "admission"},
        {"queue"},
        {"metrics"},
        {"apis"},
        {"fetch", "openapi", "middleware"},
        {"preparation"},
        {"service"},
        {"app"},
        {"lifecycle"},
    ],
    "jinaclip/server/apis": [{"items"}, {"requests"}, {"answers", "marketplaces"}],
    "jinaclip_engines": [{"errors", "graph", "store"}, {"precision"}, {"passes"}, {"onnxruntime", "tensorrt"}, {"cli"}],
    "jinaclip_engines/passes": [
        {"attention"},
        {"cls_pooling", "unpadding"},
        {"onnxruntime_cpu", "onnxruntime_cuda", "tensorrt"},
    ],
    "jinaclip_export": [
        {"errors"},
        {"towers"},
        {"checkpoint"},
        {"onnx_export"},
        {"bundle"},
        {"certification"},
        {"cli", "certify"},
    ],
    "jinaclip_bench": [
        {"errors", "tell"},
        {"measuring"},
        {"cases"},
        {"sides", "reporting"},
        {"scenarios"},
        {"run"},
        {"cli"},
    ],
}
MOST_FLAT = 8  # files in runtime/jinaclip
# Libraries, by the only places that may import them.
CONFINED = {
    "onnxruntime": {"jinaclip/backends/onnxruntime/library.py", "jinaclip_bench"},
    "tokenizers": {"jinaclip/preprocessing/text.py"},
    "tqdm": {"jinaclip/terminal.py"},
    "starlette": {"jinaclip/server"},
    "uvicorn": {"jinaclip/server"},
    "orjson": {"jinaclip/server"},
    "pydantic": {"jinaclip/server"},
    "httpx": {"jinaclip/server/fetch.py"},
    "httpcore": {"jinaclip/server/fetch.py"},
    "prometheus_client": {"jinaclip/server"},
    "tensorrt": set(),  # by name, in jinaclip/backends/tensorrt/library.py
    "tensorrt_rtx": set(),
    "cuda": {"jinaclip/backends/cuda/api.py"},
    "PIL": {"jinaclip/preprocessing", "jinaclip/model.py", "jinaclip_export", "jinaclip_bench"},
    "pyarrow": {"jinaclip/cli/encode.py"},
    "torch": {"jinaclip_export", "jinaclip_bench"},
    "onnx": {"jinaclip_engines", "jinaclip_export", "jinaclip_bench"},
    "onnx_ir": {"jinaclip_engines"},
    "safetensors": {"jinaclip_export"},
    "huggingface_hub": {"jinaclip_export"},
    "skimage": {"jinaclip_export/certification/inputs.py"},
    "matplotlib": {"jinaclip_export/certification/plot.py"},
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


def entry(name: str, folder: str) -> str | None:
    """The file or folder in `folder` that an imported name is in; None if it is not there."""
    inside = name.removeprefix(folder.replace("/", ".") + ".")
    return inside.split(".")[0] if inside != name else None


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_files_and_folders_import_only_those_of_earlier_rows(package: str, path: Path) -> None:
    relative = Path(package, path.relative_to(PACKAGES[package]))
    for folder, rows in ROWS.items():
        if not relative.is_relative_to(folder) or (relative.name == "__init__.py" and folder != "jinaclip"):
            continue
        own = relative.relative_to(folder).parts[0].removesuffix(".py")
        places = [index for index, row in enumerate(rows) if own in row]
        assert places, f"{own} has no row in {folder}"
        known = set().union(*rows)
        for name in imports(path):
            imported = entry(name, folder)
            if imported in known and imported != own:
                assert any(imported in row for row in rows[: places[0]]), f"{relative} imports {name}"


FOLDERS = sorted({path.parent for _, path in FILES})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_says_what_it_is_for(folder: Path) -> None:
    words = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    assert words, f"{folder} has no docstring"
    if folder == PACKAGES["jinaclip"]:
        assert len(list(folder.glob("*.py"))) <= MOST_FLAT
    else:
        assert "mports" in words, f"the docstring of {folder} does not say what it may import"


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_no_private_name_is_imported(package: str, path: Path) -> None:
    for name in imports(path):
        if name.split(".")[0] in PACKAGES:
            last = name.split(".")[-1]
            assert not last.startswith("_") or last.startswith("__"), f"{path} imports {name}"


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
        "         'tensorrt', 'tensorrt_rtx', 'cuda', 'starlette', 'uvicorn', 'pydantic', 'httpx', 'tqdm')\n"
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
        "jinaclip_export/certificate_captions.tsv",
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
