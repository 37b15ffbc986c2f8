"""One part in a process of its own: `python -m tests.gpu.proof.part NAME MODULE:FUNCTION …`; see __main__.py."""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

from tests.gpu.proof.context import Context


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("run")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    end = time.monotonic() + args.limit
    if args.dry_run:
        from tests.gpu.proof.dry_run import skip_values, without_cudnn

        skip_values()
        without_cudnn()
    context = Context(args.name, args.work, args.output, args.device, args.dry_run, end)
    module, _, function = args.run.partition(":")
    getattr(import_module(f"tests.gpu.proof.{module}"), function)(context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
