"""`jinaclip build --device cuda` of one tower, in a process that does not import torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jinaclip.backends.onnxruntime.cuda_operators import VARIABLE
from jinaclip.cli import main


def build(bundle: Path, tower: str, libraries: Sequence[Path | None], dry_run: bool) -> list[int]:
    """Exit status of the command with each library of operators; None is for none."""
    if dry_run:
        from tests.gpu.proof.dry_run import skip_values

        skip_values()
    codes = []
    for library in libraries:
        os.environ[VARIABLE] = "" if library is None else str(library)
        codes.append(main(["build", str(bundle), "--device", "cuda", "--towers", tower]))
    return codes
