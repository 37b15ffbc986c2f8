"""Encode texts and images; write the vectors as .npy, JSON lines or Parquet.

The rows are the texts on the command line, then those of --text-file, then the images. A row's id is its number,
from 0. JSON lines are written to stdout unless --output names a file.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.bundle.files import write_atomically
from jinaclip.cli.arguments import (
    add_encoding_arguments,
    add_model_arguments,
    find_images,
    open_model,
    read_texts,
)
from jinaclip.embeddings import check_dim, truncate
from jinaclip.errors import InputError
from jinaclip.model import ClipModel
from jinaclip.terminal import progress

EXTRA = "bulk"  # Parquet needs pyarrow
MIXED = True  # `encode BUNDLE --task T TEXT`
FORMATS = {".npy": "npy", ".jsonl": "jsonl", ".parquet": "parquet"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("texts", metavar="TEXT", nargs="*", default=[], help="texts to encode")
    parser.add_argument("--text-file", metavar="F", help="UTF-8 file with one text per line; - is stdin")
    parser.add_argument("--images", metavar="PATH", nargs="+", default=[], help="files, patterns or directories")
    parser.add_argument("--output", metavar="F", help="file to write (default: stdout)")
    formats = sorted(FORMATS.values())
    parser.add_argument("--format", choices=formats, help="output format (default: by --output's suffix, or jsonl)")
    parser.add_argument("--raw", action="store_true", help="do not normalise the vectors")
    what = "what to do if a text or image cannot be used: stop, or record its error and continue"
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail", help=what)
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if not args.texts and args.text_file is None and not args.images:
        args.usage_error("nothing to encode: give texts, --text-file or --images")
    form = args.format or FORMATS.get(Path(args.output or "").suffix.lower(), "jsonl")
    if form == "npy" and args.on_error == "skip":
        args.usage_error(".npy cannot record the errors of --on-error skip; use --format jsonl or parquet")
    if form != "jsonl" and args.output is None and sys.stdout.isatty():
        args.usage_error(f"--format {form} is binary; name a file with --output, or use a pipe")
    if args.output is not None:
        _check_output(args.output)
    if form == "parquet":
        import_module("pyarrow.parquet")  # fails before encoding, not after it, if pyarrow is missing
    texts = [_checked(text) for text in args.texts]
    if args.text_file is not None:
        texts += read_texts(args.text_file)
    errors = [text for text in texts if isinstance(text, InputError)]
    if errors and args.on_error == "fail":
        raise errors[0]
    images = find_images(args.images)
    wanted = {"text": args.texts or args.text_file is not None, "image": images}
    with open_model(args, [tower for tower in wanted if wanted[tower]]) as model:
        args.truncate_dim = dim = check_dim(args.truncate_dim, model.dims)
        rows = [*_encode_texts(model, texts, args), *_encode_images(model, images, args)]
        provenance = model.provenance_of(resize_mode=args.resize_mode, exif_transpose=args.exif_transpose)
    records = [{"id": index, **record, "provenance": provenance} for index, record in enumerate(rows)]
    _write(_serialise(records, form, dim), args.output)
    failed = sum("error" in record for record in records)
    if args.output or failed:
        skipped = f", {failed} skipped" if failed else ""
        print(f"{len(records) - failed} vectors of {dim} numbers{skipped}, provenance {provenance}", file=sys.stderr)
    return 0


Record = dict[str, Any]


def _checked(text: str) -> str | InputError:
    """The text, or an error if it is not valid UTF-8. Python decodes such arguments to lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return InputError(f"text {text!a} is not valid UTF-8; check the terminal's encoding")
    return text


def _encode_texts(model: ClipModel, texts: Sequence[str | InputError], args: argparse.Namespace) -> Iterator[Record]:
    if not texts:
        return
    good = [text for text in texts if isinstance(text, str)]
    options = {"task": args.task, "truncate_dim": args.truncate_dim, "max_length": args.max_length}
    vectors = iter(model.encode_text(good, normalize_embeddings=not args.raw, show_progress_bar=True, **options))
    for text in texts:
        if isinstance(text, InputError):
            yield {"kind": "text", "error": str(text)}
        else:
            yield {"kind": "text", "text": text, "embedding": next(vectors)}


def _encode_images(model: ClipModel, images: Sequence[str], args: argparse.Namespace) -> Iterator[Record]:
    if not images:
        return
    advance = progress("images", len(images))
    vectors = model.image_encoder.run_all(images, resize_mode=args.resize_mode, exif_transpose=args.exif_transpose)
    for path, vector in zip(images, vectors, strict=True):
        record = {"kind": "image", "path": "data:" if path[:5].lower() == "data:" else path}
        if not isinstance(vector, InputError):
            yield record | {"embedding": truncate(vector[None], args.truncate_dim, normalize=not args.raw)[0]}
        elif args.on_error == "skip":
            yield record | {"error": str(vector)}
        else:
            raise vector
        advance(1)


def _serialise(records: Sequence[Record], form: str, dim: int) -> bytes:
    if form == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.array([record["embedding"] for record in records], np.float32).reshape(-1, dim))
        return buffer.getvalue()
    if form == "parquet":
        return _parquet(records)
    lines = []
    for record in records:
        if "embedding" in record:  # nine significant digits represent every float32 exactly
            record = record | {"embedding": [float(f"{x:.9g}") for x in record["embedding"]]}
        lines.append(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    return b"".join(lines)


def _parquet(records: Sequence[Record]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    kinds = dict.fromkeys(("id", "kind", "text", "path", "error", "provenance", "embedding"), pyarrow.string())
    kinds |= {"id": pyarrow.int64(), "embedding": pyarrow.list_(pyarrow.float32())}
    columns = {name: [record.get(name) for record in records] for name in kinds}
    columns["path"] = [path and os.fsencode(path).decode("utf-8", "backslashreplace") for path in columns["path"]]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(kinds)), buffer)
    return buffer.getvalue()


def _check_output(output: str) -> None:
    if not Path(output).parent.is_dir():
        raise InputError(f"--output {output}: {Path(output).parent} is not a directory; create it first")
    if Path(output).is_dir():
        raise InputError(f"--output {output} is a directory; expected the name of a file")


def _write(content: bytes, output: str | None) -> None:
    if output is None:
        rest = memoryview(content)
        while rest:  # with PYTHONUNBUFFERED a write may be partial
            rest = rest[sys.stdout.buffer.write(rest) or 0 :]
    elif Path(output).exists() and not Path(output).is_file():  # /dev/null or a pipe, which cannot be replaced
        Path(output).write_bytes(content)
    else:
        write_atomically(Path(output), content)
