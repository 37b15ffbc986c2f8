"""Show what a bundle contains and which engines were built from it, without loading its weights."""

from __future__ import annotations

import argparse
import json

from jinaclip.bundle.engines import all_engines
from jinaclip.bundle.manifest import FORMAT_VERSION, Bundle
from jinaclip.cli.arguments import add_bundle_arguments

EXTRA = None
SHOWN = ("device", "operators", "onnxruntime", "policy", "targets", "gpu", "created")  # fields of engine.json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    bundle = Bundle(args.bundle, args.cache)
    facts = {
        "model": bundle.model,
        "provenance": bundle.provenance(dict.fromkeys(bundle.towers, "fp32")),
        "dims": list(bundle.dims),
        "logit_scale": bundle.logit_scale,
        "max_tokens": bundle.max_tokens,
        "tasks": bundle.tasks,
        "image": bundle.manifest.get("image"),
        "towers": {
            name: {"layers": t.layers, "width": t.width, "heads": t.heads, "precisions": sorted(t.graphs)}
            for name, t in bundle.towers.items()
        },
        "engines": {
            path.name: {name: sidecar[name] for name in SHOWN if sidecar.get(name)}
            for path, sidecar in all_engines(bundle)
        },
        "bytes": sum(size for size, _ in bundle.files.values()),
        "created_by": bundle.manifest.get("created_by"),
        "format_version": bundle.manifest["format_version"],
        "reader_version": FORMAT_VERSION,
    }
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, entry in value.items():
                print(f"  {name:<18} {json.dumps(entry, ensure_ascii=False)}")
        else:
            print(f"{key:<20} {value if isinstance(value, str) else json.dumps(value)}")
    return 0
