"""A new process to its first vector: `python -m jinaclip_bench.child`, started by jinaclip_bench.kinds.

Imports no more than its side needs. Prints one JSON object: the clock when the vector was there, the memory of
this process, and the vector.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jinaclip.bundle import Bundle
from jinaclip.errors import JinaClipError
from jinaclip_bench.machine import memory_of_this_process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", required=True)
    parser.add_argument("--tower", choices=("text", "image"), required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--input", required=True, help="the text, or the image's path")
    args = parser.parse_args()
    encoded = _with_jinaclip(args) if args.side == "jinaclip" else _with_torch(args)
    try:
        with encoded as vector:
            done = time.monotonic()
            memory = memory_of_this_process()  # while the model is still there
    except JinaClipError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(json.dumps({"monotonic_s": done, **memory, "vector": vector.tolist()}))
    return 0


@contextmanager
def _with_jinaclip(args: argparse.Namespace) -> Iterator[np.ndarray]:
    from jinaclip.model import ClipModel

    precision = {args.tower: args.precision}
    with ClipModel(args.bundle, towers=(args.tower,), precision=precision, threads=args.threads) as model:
        yield model.encode_text(args.input) if args.tower == "text" else model.encode_image(args.input)


@contextmanager
def _with_torch(args: argparse.Namespace) -> Iterator[np.ndarray]:
    from jinaclip.image import preprocess
    from jinaclip.text import TextTokenizer
    from jinaclip_bench.torch_side import open_torch
    from jinaclip_export.checkpoint import Checkpoint

    bundle = Bundle(args.bundle)
    checkpoint = Checkpoint(args.checkpoint, bundle.model.get("adaptation"))
    with open_torch(checkpoint, bundle, args.tower, threads=args.threads, sides=[args.side]) as embedders:
        if args.tower == "image":
            inputs = preprocess(args.input, bundle.preprocessing)[None]
        else:
            tokenizer = TextTokenizer(bundle.tokenizer, vocab_size=bundle.vocab_size, special_ids=bundle.special_ids)
            inputs = tokenizer.padded(tokenizer.encode([args.input]))
        yield embedders[args.side](inputs)[0]


if __name__ == "__main__":
    sys.exit(main())
