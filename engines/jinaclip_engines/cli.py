"""Prepare a bundle's graphs for this machine.

What is made lies in BUNDLE/engines, or in --cache DIR for a bundle that is read-only, and is used by itself wherever
it fits: the same CPU features and the same onnxruntime. Elsewhere the bundle's own graphs run, and `jinaclip info`
says why.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from jinaclip.bundle import TOWERS, Bundle
from jinaclip.cli.arguments import words_of
from jinaclip.errors import BackendMissing
from jinaclip.model import ClipModel
from jinaclip.progress import say

EXTRA = "build"
PRECISIONS = ("fp32", "int8")  # float16 has no kernels on a CPU: those graphs are for GPUs
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="directory made by `jinaclip export`")
    parser.add_argument("--backend", choices=BACKENDS, default="onnxruntime", help="what the graphs will run on")
    parser.add_argument(
        "--towers", type=words_of(TOWERS), metavar="T,…", help="text, image or both (default: all of the bundle)"
    )
    parser.add_argument(
        "--precision", type=words_of(PRECISIONS), metavar="P,…", help="of fp32, int8 (default: all of the bundle)"
    )
    parser.add_argument("--cache", metavar="DIR", help="where to write for a bundle that is read-only")
    parser.add_argument("--force", action="store_true", help="make them again even where they fit")
    parser.add_argument("--json", action="store_true", help="what was made, as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    if args.backend != "onnxruntime":
        raise BackendMissing(f"--backend {args.backend} is not part of this version; expected onnxruntime")
    from jinaclip_engines.prepare import prepare

    bundle = Bundle(args.bundle, args.cache)
    made = []
    for tower in args.towers or bundle.towers:
        for precision in args.precision or [p for p in PRECISIONS if p in bundle.tower(tower).graphs]:
            bundle.graph(tower, precision)  # before anything is made
            start = time.monotonic()
            say(f"{tower} {precision}")
            key, new = prepare(bundle, tower, precision, force=args.force)
            with ClipModel(args.bundle, towers=(tower,), precision=precision, cache_dir=args.cache) as model:
                test = model.info()["towers"][tower]["self_test"]
            made.append({"tower": tower, "precision": precision, "engine": key, "made": new, "self_test": test})
            if not args.json:
                how = f"{time.monotonic() - start:.1f} s" if new else "fits already"
                print(f"{tower} {precision}: {key}, {how}", file=sys.stderr)
    if args.json:
        print(json.dumps(made, indent=1))
    return 0
