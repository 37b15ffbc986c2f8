"""The kit that tests/gpu/pack_kit.py makes and tests/gpu/prove.sh carries to a machine with a GPU.

onnxruntime.tar.xz      onnxruntime-gpu with the device code of one GPU generation
graphs.tar.xz           small/ and full/: the towers' fp32 graphs without weights, and where these come from
libjinaclip_cuda.so     our own operators, where they are built
kit.json                the files above with their sha256, and what they were made of
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

INDEX = "kit.json"
ONNXRUNTIME, GRAPHS, OPERATORS = "onnxruntime.tar.xz", "graphs.tar.xz", "libjinaclip_cuda.so"
SIZES = ("small", "full")


def write_index(kit: Path, facts: dict[str, Any]) -> None:
    """kit.json of a folder whose other files are there."""
    files = {path.name: sha256_of(path) for path in sorted(kit.iterdir()) if path.is_file() and path.name != INDEX}
    (kit / INDEX).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", "utf-8")


def unpack(kit: Path, target: Path) -> dict[str, Any]:
    """Lay a kit out: TARGET/site for PYTHONPATH, TARGET/graphs/small and full, TARGET/libjinaclip_cuda.so.

    Returns:
        What kit.json says.

    Raises:
        ValueError: a file is missing or damaged.
    """
    index: dict[str, Any] = json.loads((kit / INDEX).read_text("utf-8"))
    for name, expected in index["files"].items():
        path = kit / Path(name).name
        if not path.is_file() or sha256_of(path) != expected:
            raise ValueError(f"{path} is missing or damaged; pack the kit again")
    for name, folder in ((ONNXRUNTIME, "site"), (GRAPHS, "graphs")):
        if name in index["files"]:
            with tarfile.open(kit / name, "r:xz") as archive:
                archive.extractall(target / folder, filter="data")
    if OPERATORS in index["files"]:
        shutil.copyfile(kit / OPERATORS, target / OPERATORS)
    return index


def sha256_of(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
