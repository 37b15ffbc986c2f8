"""A checkout runs where nothing can be installed: names, version and verbs are those of the installed package."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from tests.support.from_checkout import ROOT, write_metadata


def test_the_metadata_is_the_installed_packages(tmp_path: Path) -> None:
    write_metadata(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    installed = importlib.metadata.distribution("jinaclip")
    assert (found.name, found.version) == (installed.name, installed.version)
    assert {(e.group, e.name, e.value) for e in found.entry_points} == {
        (e.group, e.name, e.value) for e in installed.entry_points
    }


def test_a_verb_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/support/from_checkout.py"), "-m", "jinaclip", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout == f"jinaclip {importlib.metadata.version('jinaclip')}\n" and done.returncode == 0
    script = "import sys; sys.exit(7)"
    assert subprocess.run([*command[:2], "-c", script], timeout=120).returncode == 7
