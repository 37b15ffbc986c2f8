"""Compute one vector in a new process, started by scenarios/new_process.py.

It imports only what its side needs. It prints one JSON object: the clock before and after the call, the memory of this
process, and the vector.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import JinaClipError
from jinaclip_bench.measuring.machine import memory_of_this_process, reset_peak, resident_mib

Call = Callable[[], np.ndarray]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    required = partial(parser.add_argument, required=True)
    required("--side")
    required("--time", choices=("first", "call"), help="first: the whole process; call: without loading the model")
    required("--tower", choices=("text", "image"))
    required("--bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    required("--precision")
    required("--threads", type=int)
    required("--input", type=Path, help="file with the text or the image")
    args = parser.parse_args()
    try:
        with _open_jinaclip(args) if args.side == "jinaclip" else _open_torch(args) as call:
            if args.time == "call":
                reset_peak()
            before = resident_mib()
            begun = time.monotonic()
            vector = call()
            done = time.monotonic()
            memory = memory_of_this_process()  # before the model is freed
    except JinaClipError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    peak = memory["peak_rss_mib"]
    above = None if peak is None or before is None else round(peak - before, 1)
    times = {"begun_s": begun, "done_s": done}
    print(json.dumps({**times, **memory, "above_load_mib": above, "vector": vector.tolist()}))
    return 0


@contextmanager
def _open_jinaclip(args: argparse.Namespace) -> Iterator[Call]:
    from jinaclip.model import ClipModel

    precision = {args.tower: args.precision}
    with ClipModel(args.bundle, towers=(args.tower,), precision=precision, threads=args.threads) as model:
        if args.tower == "text":
            yield lambda: model.encode_text(args.input.read_text("utf-8"))
        else:
            yield lambda: model.encode_image(args.input)


@contextmanager
def _open_torch(args: argparse.Namespace) -> Iterator[Call]:
    from jinaclip.preprocessing.image import preprocess  # without an encoder, which needs a session
    from jinaclip_bench.sides.torch_cpu import open_torch
    from jinaclip_export.checkpoint.reader import Checkpoint

    bundle = Bundle(args.bundle)
    checkpoint = Checkpoint(args.checkpoint, bundle.model.get("adaptation"))

    def call() -> np.ndarray:
        if args.tower == "image":
            inputs = preprocess(args.input, bundle.preprocessing)[None]
        else:
            tokenizer = bundle.open_tokenizer()
            inputs = tokenizer.padded(tokenizer.encode([args.input.read_text("utf-8")]))
        vector: np.ndarray = embed(inputs)[0]
        return vector

    with open_torch(checkpoint, bundle, args.tower, threads=args.threads, sides=[args.side]) as embedders:
        embed = embedders[args.side]
        yield call


if __name__ == "__main__":
    sys.exit(main())
