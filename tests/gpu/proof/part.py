"""One part in a process of its own: `python -m tests.gpu.proof.part NAME MODULE:FUNCTION …`; see __main__.py."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from tests.gpu.proof.context import Context


def main() -> NoReturn:
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
    faulthandler.dump_traceback_later(max(1.0, args.limit - 1.0))  # where it hangs, if it does
    if args.dry_run:
        from tests.gpu.proof.dry_run import skip_values, without_cudnn

        skip_values()
        without_cudnn()
    context = Context(args.name, args.work, args.output, args.device, args.dry_run, end)
    module, _, function = args.run.partition(":")
    code = 0
    try:
        getattr(import_module(f"tests.gpu.proof.{module}"), function)(context)
    except SystemExit as error:
        print(error.code, flush=True)
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch's compiler may wait for its workers for minutes


if __name__ == "__main__":
    main()
