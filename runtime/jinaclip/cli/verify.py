"""Check a bundle: the sha256 of every file, then the self-test of every graph or, on a GPU, of every engine."""

from __future__ import annotations

import argparse
import json

from jinaclip.backends.selection import BACKENDS, choose_backend
from jinaclip.bundle.manifest import Bundle
from jinaclip.model import ClipModel
from jinaclip.terminal import say

EXTRA = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="directory made by `jinaclip export`")
    parser.add_argument("--backend", choices=BACKENDS, default="onnxruntime", help="library that runs the graphs")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N; auto is cpu for onnxruntime, else cuda")
    parser.add_argument("--threads", type=int, help="number of cores (default: all that this process may use)")
    parser.add_argument("--cache", metavar="DIR",
                        help="directory for self-test results, certificates and engines when the bundle is "
                             "read-only")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    bundle = Bundle(args.bundle, args.cache)
    device = "cpu" if (args.backend, args.device) == ("onnxruntime", "auto") else args.device
    backend = choose_backend(bundle, tuple(bundle.towers), backend=args.backend, device=device)
    bundle.verify_hashes(lambda name: say(f"sha256 {name}"))
    results = []
    for tower in bundle.towers:
        for precision in backend.precisions(bundle, tower):
            say(f"self-test {tower} {precision}")
            with ClipModel(
                args.bundle, backend=backend.name, device=device, towers=(tower,), precision={tower: precision},
                threads=args.threads, cache_dir=args.cache, self_test="always",
            ) as model:  # fmt: skip
                test = model.info()["towers"][tower]
                results.append({"tower": tower, "precision": precision, "backend": test["backend"],
                                "error_ratio": test["self_test"]["ratio"]})  # fmt: skip
    if args.json:
        print(json.dumps({"files": len(bundle.files), "self_tests": results}))
    else:
        print(f"ok  {len(bundle.files)} files match their sha256")
        for r in results:
            print(f"ok  {r['tower']} {r['precision']} on {r['backend']}: self-test passed, relative error "
                  f"{r['error_ratio']:.1e}")  # fmt: skip
    return 0
