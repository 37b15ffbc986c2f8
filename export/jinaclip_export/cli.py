"""Make a bundle from a checkpoint, or from random weights.

CHECKPOINT is a directory with the published files of jina-clip-v2, or a hub id such as jinaai/jina-clip-v2
(licence CC BY-NC 4.0, 1.7 GB). A full-size export needs the memory and time that the README states.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from jinaclip.bundle.manifest import PRECISION_CLASS, TOWERS
from jinaclip.cli.arguments import words_of

if TYPE_CHECKING:
    from jinaclip_export.bundle.manifest import Identity

EXTRA = "export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="directory or hub id")
    source.add_argument("--random", choices=("small", "full"), help="seeded random weights instead of a checkpoint")
    parser.add_argument("--output", metavar="BUNDLE", required=True, help="directory to create")
    parser.add_argument("--towers", type=words_of(TOWERS), default="text,image", help="text, image or both")
    precisions = "precisions of the graphs: fp32 (the reference), fp16, int8"
    parser.add_argument("--precision", type=words_of(tuple(PRECISION_CLASS)), default="fp32", help=precisions)
    pixels = "image input: uint8 [B, S, S, 3], or float32 [B, 3, S, S] as published"
    parser.add_argument("--pixels", choices=("uint8", "float32"), default="uint8", help=pixels)
    parser.add_argument("--revision", metavar="R", help="revision of the hub id (default: the one tested)")
    parser.add_argument("--adaptation", metavar="A", help="adapter to merge (default: the checkpoint's default)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights of --random")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json for --random (default: a generated one)")
    parser.add_argument("--checkpoint-output", metavar="DIR", help="directory to save the checkpoint of --random in")


def run(args: argparse.Namespace) -> int:
    from jinaclip_export.bundle.manifest import Identity
    from jinaclip_export.bundle.writer import check_output, export_bundle
    from jinaclip_export.checkpoint.reader import Checkpoint

    if args.random is None:
        for name in ("tokenizer", "checkpoint_output"):
            if getattr(args, name) is not None:
                args.usage_error(f"--{name.replace('_', '-')} can only be used with --random")
    if abs(args.seed) >= 1 << 63:
        args.usage_error(f"--seed {args.seed} is too large, expected less than 2**63")
    output = Path(args.output).absolute()
    check_output(output)
    # The name has the form of a partial bundle's, so that the next export removes it if this process is killed.
    prefix, suffix = f".{output.name}.partial-random-", f"-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=suffix, dir=output.parent) as scratch:
        if args.random is not None:
            directory = Path(args.checkpoint_output or Path(scratch) / "checkpoint")
            _make_random(args, directory)
            identity = Identity(f"random-{args.random}", f"seed-{args.seed}", "none: random weights")
        else:
            directory, identity = _find(args)
        checkpoint = Checkpoint(directory, args.adaptation)
        bundle = export_bundle(
            checkpoint, output, identity=identity, towers=args.towers, precisions=args.precision, pixels=args.pixels
        )
    size = sum(size for size, _ in bundle.files.values()) / 1e6
    model = f"{bundle.model['id']}, licence {bundle.model['licence'] or 'not stated'}"
    print(f"{args.output}: {', '.join(bundle.towers)}; {size:,.0f} MB; {model}", file=sys.stderr)
    return 0


def _make_random(args: argparse.Namespace, directory: Path) -> None:
    from safetensors import SafetensorError

    from jinaclip.terminal import say
    from jinaclip_export.checkpoint.random_weights import SIZES, published_config, write_random_checkpoint
    from jinaclip_export.errors import ExportError

    if directory.exists() and any(directory.iterdir()):
        raise ExportError(f"--checkpoint-output {directory} already exists; choose another one or remove it first")
    if args.tokenizer and not Path(args.tokenizer).is_file():
        raise ExportError(f"--tokenizer {args.tokenizer} is not a file; expected a tokenizer.json")
    say("random checkpoint")
    config, tokenizer = published_config(**SIZES[args.random]), Path(args.tokenizer) if args.tokenizer else None
    try:
        write_random_checkpoint(directory, config, seed=args.seed, tokenizer=tokenizer)
    except SafetensorError as error:  # safetensors raises this for a full disk too
        raise ExportError(f"cannot write the random checkpoint to {directory}: {error}") from error


def _find(args: argparse.Namespace) -> tuple[Path, Identity]:
    from jinaclip_export.bundle.manifest import Identity
    from jinaclip_export.checkpoint.hub import PUBLISHED_ID, PUBLISHED_LICENCE, fetch

    path = Path(args.checkpoint)
    looks_like_id = args.checkpoint.count("/") == 1 and not args.checkpoint.startswith((".", "/", "~"))
    if path.exists() or not looks_like_id:
        return path, Identity(path.absolute().name, args.revision)
    licence = PUBLISHED_LICENCE if args.checkpoint == PUBLISHED_ID else None
    directory = fetch(args.checkpoint, args.revision)
    return directory, Identity(args.checkpoint, directory.name, licence)  # the hub client names it after the commit
