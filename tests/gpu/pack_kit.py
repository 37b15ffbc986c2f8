"""Pack what tests/gpu/prove.sh takes to a machine that has a GPU and no network.

    python tests/gpu/pack_kit.py [--output .gpu] [--full DIRECTORY] [--library libjinaclip_cuda.so]

Needs torch, onnx, pip and the command zstd here; there nothing but Python with torch, onnx and onnx-ir. The folder and
the checkout together stay under --limit MiB, or the command fails. It takes some minutes and, without --full, 9 GB of
memory.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if not __package__:  # run as a file: the sources of this checkout, whether they are installed or not
    command = [sys.executable, str(ROOT / "tests/support/from_checkout.py"), "-m", "tests.gpu.pack_kit", *sys.argv[1:]]
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)

from jinaclip_export.bundle.manifest import Identity  # noqa: E402
from jinaclip_export.bundle.writer import export_bundle  # noqa: E402
from jinaclip_export.checkpoint.random_weights import SIZES, published_config, write_random_checkpoint  # noqa: E402
from jinaclip_export.checkpoint.reader import Checkpoint  # noqa: E402
from tests.gpu.device_code import reduce  # noqa: E402
from tests.gpu.proof.kit import GRAPHS, ONNXRUNTIME, OPERATORS, write_index  # noqa: E402
from tests.gpu.proof.topology import save_topology  # noqa: E402

VERSION = "1.31.1"  # of onnxruntime-gpu
VOCABULARY = 36864  # of the full-size tower, whose own of 250,002 is 0.9 GB of weights that a run hardly reads
# Left out of the wheel: what no session needs.
UNWANTED = (
    "onnxruntime/capi/libonnxruntime.so", "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
    "onnxruntime/tools/", "onnxruntime/transformers/", "onnxruntime/quantization/", "onnxruntime/datasets/",
)  # fmt: skip
# Kernels of grouped products (mixture of experts) and of products with integer weights: this model has neither.
UNUSED = "MoeFCGemm|MoeGemm|GroupProblemShape|GemmFpAIntB|fpA_intB"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / ".gpu", metavar="DIR", help="the kit (default: .gpu)")
    parser.add_argument("--wheel", type=Path, help="onnxruntime-gpu's (default: downloaded with pip)")
    parser.add_argument("--python", default="3.12", metavar="V", help="Python's version there (default: 3.12)")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU, 90 for 9.0 (default: 90)")
    parser.add_argument("--full", type=Path, metavar="DIR", help="with checkpoint/ and bundle/ of the full size")
    parser.add_argument("--library", type=Path, help=f"our operators (default: {OPERATORS} of the kit, if there)")
    parser.add_argument("--keep", action="store_true", help="keep the packed onnxruntime that is there")
    parser.add_argument("--limit", type=float, default=60.0, metavar="MIB", help="of kit and checkout (default: 60)")
    args = parser.parse_args(words)
    kit: Path = args.output
    kit.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        if not (args.keep and (kit / ONNXRUNTIME).is_file()):
            pack_onnxruntime(args.wheel, args.python, args.capability, Path(temporary, "wheel"), kit / ONNXRUNTIME)
        pack_graphs(args.full, Path(temporary, "graphs"), kit / GRAPHS)
    if args.library is not None:
        shutil.copyfile(args.library, kit / OPERATORS)
    write_index(kit, {"onnxruntime": VERSION, "python": args.python, "capability": args.capability})
    return 0 if check_size(kit, args.limit) else 1


def pack_onnxruntime(wheel: Path | None, python: str, capability: int, work: Path, archive: Path) -> None:
    """A wheel of onnxruntime-gpu, reduced, as a .tar.xz."""
    if wheel is None:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
             "--python-version", python, "--implementation", "cp", "--platform", "manylinux_2_28_x86_64",
             "--dest", str(work), f"onnxruntime-gpu=={VERSION}"],
            check=True,
        )  # fmt: skip
        (wheel,) = work.glob("*.whl")
    tree = work / "tree"
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tree, [name for name in content.namelist() if not name.startswith(UNWANTED)])
    (library,) = tree.rglob("libonnxruntime_providers_cuda.so")
    found = reduce(library, capability, UNUSED)
    print(
        f"device code: {found.bytes / 2**20:.1f} MiB in {found.containers} containers stay, {found.unused_containers} "
        f"containers of grouped and mixed products are zeroed ({found.unused_bytes / 2**20:.1f} MiB)"
    )
    pack(tree, archive)


def pack_graphs(full: Path | None, work: Path, archive: Path) -> None:
    """The topology of both sizes, as a .tar.xz."""
    tree = work / "tree"
    for size, settings in SIZES.items():
        config = published_config(**settings)
        if size == "full":
            config["text_config"]["hf_model_config_kwargs"]["vocab_size"] = VOCABULARY
        directory = full if size == "full" and full is not None else work / size
        if directory is not full:
            export(config, directory)
        checkpoint = Checkpoint(directory / "checkpoint")
        (tree / size).mkdir(parents=True)
        (tree / size / "config.json").write_text(json.dumps(checkpoint.read_json("config.json")), "utf-8")
        for name, tower in (("text", checkpoint.text_tower), ("image", checkpoint.image_tower)):
            save_topology(directory / "bundle" / f"{name}-fp32.onnx", tower(), tree / size)
    pack(tree, archive)


def export(config: dict[str, Any], directory: Path) -> None:
    """checkpoint/ with random weights, and its bundle/ in float32."""
    directory.mkdir(parents=True, exist_ok=True)
    write_random_checkpoint(directory / "checkpoint", config)
    identity = Identity("random", "seed-0", "none: random weights")
    export_bundle(Checkpoint(directory / "checkpoint"), directory / "bundle", identity=identity)


def pack(tree: Path, archive: Path) -> None:
    """A folder's content as a .tar.xz."""
    filters = [
        {"id": lzma.FILTER_X86},
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 192 << 20},
    ]
    with lzma.open(archive, "wb", filters=filters) as packed, tarfile.open(fileobj=packed, mode="w") as content:
        for path in sorted(tree.iterdir()):
            content.add(path, path.name)
    print(f"{archive.name}: {archive.stat().st_size / 2**20:.1f} MiB")


def check_size(kit: Path, limit: float) -> bool:
    """Whether kit and checkout are small enough to travel; says how large they are."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    checkout = sum((ROOT / name).stat().st_size for name in set(names) if name and (ROOT / name).is_file())
    carried = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())
    total = (checkout + carried) / 2**20
    print(f"{kit}: {carried / 2**20:.1f} MiB, with the checkout {total:.1f} MiB of {limit:g} MiB")
    if total > limit:
        print(f"too large by {total - limit:.1f} MiB", file=sys.stderr)
    return total <= limit


if __name__ == "__main__":
    sys.exit(main())
