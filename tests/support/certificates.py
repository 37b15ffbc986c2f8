"""Certify random checkpoints with `jinaclip certify`, and write the page with the tables.

python -m tests.support.certificates            small, full-width and outliers (10 minutes)
python -m tests.support.certificates --full     the full-size random checkpoint too (an hour, 12 GB of memory)
... --write                                     write the results to bench/results/certificates and docs/certificates.md
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
        "5 blocks, width 1024, 140 px. Six outlier channels: after the second block, their weights are multiplied by "
        "100 (norm gains in the text tower, output rows of attn.proj and w3 in the image tower)",
        ("fp32", "fp16", "int8"),
    ),
    "full": (
        "24 blocks, width 1024, 512 px. The int8 graphs were prepared for the CPU (`jinaclip build`)",
        ("fp32", "int8"),
    ),
}
HEAD = """# Certificates of random checkpoints

This page shows the accuracy of each precision, as measured by `jinaclip certify BUNDLE --against CHECKPOINT` on four
random checkpoints. The inputs are the texts and pictures that are built into the command. Each verdict
has their number.

- fp32 is compared with torch.
- fp16 and int8 are compared with fp32.
- The checkpoint `full` was certified without `--against`, so its fp32 graphs were not compared with torch.

| column | meaning |
|---|---|
| `dim` | length of the embedding after truncation |
| `cosine min`, `1 %`, `mean` | cosine between an embedding and its reference: smallest, 1st percentile and mean |
| `max abs` | largest absolute error of a component of an embedding |
| `error÷nearest`, `median` | error divided by the distance to the nearest other item: largest and median |
| `top 10` | mean share of the ten nearest items of the same tower that are the same as in the reference |
| `across` | the same for the ten nearest items of the other tower |

The line of each tower below a table has the verdict, the number of different texts or pictures, and the difference
between an embedding computed alone and in a batch with an outlier. The bounds are in [the bundle
format](bundle.md#certificates). One verdict is "failed": the fp32 text tower of the checkpoint `outliers` differs from
torch by more than the bound. The cause is its outlier channels ([decision 015](decisions/015-float32-blocks.md)).

`python -m tests.support.certificates --full --write` measures the tables again.
"""


def make(name: str, directory: Path) -> tuple[Path, Path]:
    """Write a checkpoint and its bundle, and return their paths."""
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
    """Certify a bundle. The int8 graphs of the full size are prepared first, because they run faster."""
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
    """The content of docs/certificates.md."""
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
    """The stored certificates by checkpoint, in the order of CHECKPOINTS."""
    paths = {name: RESULTS / f"{name}.json" for name in CHECKPOINTS}
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CHECKPOINTS], help="(default: all but full)")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--bundle", type=Path, help="existing bundle of the checkpoint given by name")
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
