"""Run Python on a checkout that is not installed, as if it were: for machines where nothing can be installed.

    python tests/support/from_checkout.py -m pytest -m gpu tests/gpu
    python tests/support/from_checkout.py -m jinaclip bench run --suite gpu

The four source roots go onto PYTHONPATH, before what is there, with a directory that holds the name, version and entry
points of pyproject.toml as an installed package's metadata.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("runtime", "engines", "export", "bench")


def write_metadata(directory: Path) -> None:
    """What importlib.metadata asks of an installed package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    info = directory / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", "utf-8"
    )
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", "utf-8")


def main(words: list[str]) -> int:
    with tempfile.TemporaryDirectory() as directory:
        write_metadata(Path(directory))
        paths = [*(str(ROOT / source) for source in SOURCES), directory, os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        return subprocess.run([sys.executable, *words], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
