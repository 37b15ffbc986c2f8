"""`jinaclip build --device cuda` of one tower, in a process that does not import torch."""

from __future__ import annotations

from pathlib import Path

from jinaclip.cli import main


def build(bundle: Path, tower: str, dry_run: bool) -> int:
    """Exit status of the command."""
    if dry_run:
        from tests.gpu.proof.dry_run import skip_values

        skip_values()
    return main(["build", str(bundle), "--device", "cuda", "--towers", tower])
