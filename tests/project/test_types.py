"""The types of the public API, as mypy and pyright see them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLIC_CALLS = ROOT / "tests/project/public_calls.py"
WRONG_CALLS = """
from jinaclip import ClipModel

def wrong(model: ClipModel) -> None:
    model.encode_text(7)
    model.encode_text("a", truncate="256")
    model.encode_image("a.jpg", batch_size="8")
    print(model.dims + 1)
    model.embed("a")
"""
CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", "--strict"],
    "pyright": [sys.executable, "-m", "pyright", "--pythonpath", sys.executable],
}


def check(checker: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    return subprocess.run(
        [*CHECKERS[checker], str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("checker", CHECKERS)
def test_public_calls_are_accepted(checker: str) -> None:
    done = check(checker, PUBLIC_CALLS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("checker", CHECKERS)
def test_wrong_calls_are_refused(checker: str, tmp_path: Path) -> None:
    """Each line is an error: the package is found, and its types are not Any."""
    path = tmp_path / "wrong.py"
    path.write_text(WRONG_CALLS)
    found = check(checker, path).stdout
    for line in range(5, 10):
        assert f"wrong.py:{line}:" in found, found
