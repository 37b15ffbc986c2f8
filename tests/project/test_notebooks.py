"""The notebooks of examples/, run from the first cell to the last in a kernel of their own, as Jupyter runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jinaclip import ClipModel
from tests.conftest import PHOTOS

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(notebook.read_text("utf-8"))["cells"]
    return cells


def printed(cell: dict[str, Any]) -> str:
    """What a cell printed, and its last value as text."""
    found = []
    for output in cell["outputs"]:
        assert output["output_type"] != "error", output
        assert output.get("name") != "stderr", output
        found += output["text"] if "text" in output else output["data"]["text/plain"]
    return "".join(found)


@pytest.fixture
def executed(small_bundle: Path, tmp_path: Path, fresh_home: dict[str, str]) -> dict[str, str]:
    """What each code cell of photo-search.ipynb printed, by the cell's id. Runs in tmp_path, with the photos of the
    tests; IPython and Jupyter write into an empty home directory.
    """
    shutil.copyfile(EXAMPLES / "photo-search.ipynb", tmp_path / "photo-search.ipynb")
    (tmp_path / "bundle").symlink_to(small_bundle)
    (tmp_path / "photos/more").mkdir(parents=True)
    for number, photo in enumerate(PHOTOS):
        shutil.copyfile(photo, tmp_path / ("photos/more" if number % 2 else "photos") / photo.name)
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {k: v for k, v in fresh_home.items() if k not in names}
    command = [sys.executable, "-m", "jupyter", "execute", "--inplace", "photo-search.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = cells_of(tmp_path / "photo-search.ipynb")
    return {cell["id"]: printed(cell) for cell in cells if cell["cell_type"] == "code"}


def test_photo_search_finds_and_saves(executed: dict[str, str], model: ClipModel, tmp_path: Path) -> None:
    index = np.load(tmp_path / "index.npz")
    photos = [tmp_path / "photos" / name for name in index["names"]]
    assert sorted(path.name for path in photos) == sorted(path.name for path in PHOTOS)
    vectors = model.encode_image(photos, truncate_dim=64)
    np.testing.assert_array_equal(index["vectors"], vectors)
    assert str(index["provenance"]) == model.provenance

    assert executed["index"] == "(5, 64)"
    query = model.encode_text("a cup of coffee", task="retrieval.query", truncate_dim=64)
    lines = executed["text-search"].splitlines()[: len(photos)]
    for line, position in zip(lines, np.argsort(-(vectors @ query)), strict=True):
        assert line == f"{vectors[position] @ query:.3f}  {photos[position].name}"
    assert executed["photo-search"].startswith(f"1.000  {photos[0].name}\n")
    assert float(executed["dims"].removeprefix("largest difference: ")) < 1e-6
    assert executed["cost"].splitlines()[-1] == f"{model.dims[-1]:4}  {4 * model.dims[-1]:5}  100%"
    assert model.provenance in executed["provenance"]
    assert model.provenance_of(exif_transpose=True) in executed["provenance"]
    for cell in ("text-search", "photo-search", "load"):
        assert "PIL.Image.Image" in executed[cell], cell


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_without_outputs(notebook: Path) -> None:
    cells = cells_of(notebook)
    for cell in cells:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
    metadata = json.loads(notebook.read_text("utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3" and metadata["language_info"] == {"name": "python"}
    assert len({cell["id"] for cell in cells}) == len(cells)
