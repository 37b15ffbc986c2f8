"""Check a bundle: the sha256 of every file, then the self-test of every graph or, on a GPU, of every engine."""

from __future__ import annotations

import argparse
import json
from contextlib import closing

from jinaclip.backends.selection import BACKENDS, choose_backend
from jinaclip.bundle.manifest import Bundle
from jinaclip.cli.arguments import add_bundle_arguments
from jinaclip.encoders import ENCODERS
from jinaclip.model import check_count
from jinaclip.terminal import say

EXTRA = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_arguments(parser)
    parser.add_argument("--backend", choices=BACKENDS, default="onnxruntime", help="library that runs the graphs")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N; auto is cpu for onnxruntime, else cuda")
    parser.add_argument("--threads", type=int, help="number of cores (default: all that this process may use)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    check_count("threads", args.threads)
    bundle = Bundle(args.bundle, args.cache)
    device = "cpu" if (args.backend, args.device) == ("onnxruntime", "auto") else args.device
    backend = choose_backend(bundle, tuple(bundle.towers), backend=args.backend, device=device)
    bundle.verify_hashes(lambda name: say(f"sha256 {name}"))
    results = []
    for tower in bundle.towers:
        for precision in backend.precisions(bundle, tower):
            say(f"self-test {tower} {precision}")
            session, _ = backend.open(bundle, tower, precision, threads=args.threads)
            with closing(session):
                ratio = ENCODERS[tower](bundle, precision, session).check()["ratio"]
            results.append({"tower": tower, "precision": precision, "backend": session.backend, "error_ratio": ratio})
    if args.json:
        print(json.dumps({"files": len(bundle.files), "self_tests": results}))
    else:
        print(f"ok  {len(bundle.files)} files match their sha256")
        for r in results:
            test = f"{r['tower']} {r['precision']} on {r['backend']}"
            print(f"ok  {test}: self-test passed, relative error {r['error_ratio']:.1e}")
    return 0
