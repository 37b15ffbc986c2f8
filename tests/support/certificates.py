"""Certify random checkpoints with `jinaclip certify`, and make the page of their tables.

python -m tests.support.certificates            small, full-width and outliers (10 minutes)
python -m tests.support.certificates --full     the full-size random checkpoint too (an hour, 12 GB of memory)
... --write                             keep them in bench/results/certificates and in docs/certificates.md
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from jinaclip.bundle.manifest import Bundle
from jinaclip.cli import main as jinaclip
from jinaclip_engines.onnxruntime.prepare import prepare
from jinaclip_export.bundle.manifest import Identity
from jinaclip_export.bundle.writer import export_bundle
from jinaclip_export.certification.table import render
from jinaclip_export.checkpoint.random_weights import SIZES, published_config, write_random_checkpoint
from jinaclip_export.checkpoint.reader import Checkpoint
from tests.engines.test_outliers import checkpoint_of, outliers

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/certificates"
PAGE = ROOT / "docs/certificates.md"
OUTLIER_CHANNELS = (800, 850, 900, 950, 1000, 1010)

# name -> what it is, precisions
CHECKPOINTS = {
    "small": ("3 blocks, width 128, 140 px", ("fp32", "fp16", "int8")),
    "full-width": ("2 blocks, width 1024, 512 px", ("fp32", "fp16", "int8")),
    "outliers": (
        "5 blocks, width 1024, 140 px; six channels × 100 after the second block: norm gains in text, output rows of "
        "attn.proj and w3 in images",
        ("fp32", "fp16", "int8"),
    ),
    "full": ("24 blocks, width 1024, 512 px; int8 in graphs prepared for the CPU", ("fp32", "int8")),
}
HEAD = """# Certificates of random checkpoints

What `jinaclip certify BUNDLE --against CHECKPOINT` says of them, on its built-in 260 sentences and 144 crops of photos;
fp32 is compared with torch, the others with fp32 (the full size without --against: fp32 compared with nothing). Made by
`python -m tests.support.certificates --full --write`. The bounds are in [bundle.md](bundle.md).
"""


def make(name: str, directory: Path) -> tuple[Path, Path]:
    """Checkpoint and bundle."""
    path = directory / "checkpoint"
    if name == "outliers":
        checkpoint_of(path, 1024, outliers(100, OUTLIER_CHANNELS))
    elif name == "full-width":
        write_random_checkpoint(
            path, published_config(1024, {"vocab_size": 36864, "num_hidden_layers": 2}, {"layers": 2})
        )
    else:
        write_random_checkpoint(path, published_config(**SIZES[name]))
    export_bundle(
        Checkpoint(path), directory / "bundle", identity=Identity(f"random-{name}"), precisions=CHECKPOINTS[name][1]
    )
    return path, directory / "bundle"


def certify(name: str, checkpoint: Path, bundle: Path) -> list[dict[str, Any]]:
    """The certificates, prepared graphs where the size makes them worth it."""
    words = ["certify", str(bundle), "--json"]
    if name == "full":
        opened = Bundle(bundle)
        for tower in opened.towers:
            prepare(opened, tower, "int8")
    else:
        words += ["--against", str(checkpoint)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        jinaclip(words)
    found: list[dict[str, Any]] = json.loads(out.getvalue())
    return found


def page(results: dict[str, list[dict[str, Any]]]) -> str:
    """docs/certificates.md."""
    parts = [HEAD]
    for name, certificates in results.items():
        session = certificates[-1]["session"]
        features = session["cpu_features"]
        parts.append(
            f"\n## {name}\n{CHECKPOINTS[name][0]}. onnxruntime {session['version']}, {session['cpu']} ({features}).\n\n"
            f"```\n{render(certificates)}\n```\n"
        )
    return "".join(parts)


def read() -> dict[str, list[dict[str, Any]]]:
    """What was kept, in CHECKPOINTS' order."""
    paths = {name: RESULTS / f"{name}.json" for name in CHECKPOINTS}
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CHECKPOINTS], help="(default: all but full)")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--bundle", type=Path, help="of the one name: made already, not made anew")
    args = parser.parse_args()
    names = args.names or [name for name in CHECKPOINTS if name != "full"]
    for name in dict.fromkeys([*names, *(["full"] if args.full else [])]):
        with tempfile.TemporaryDirectory() as directory:
            checkpoint, bundle = (Path(), args.bundle) if args.bundle else make(name, Path(directory))
            found = certify(name, checkpoint, bundle)
        print(render(found), file=sys.stderr)
        if args.write:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            PAGE.write_text(page(read()), "utf-8")


if __name__ == "__main__":
    main()
