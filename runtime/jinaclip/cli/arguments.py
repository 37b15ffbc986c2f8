"""Arguments that several verbs share: opening a model, and finding texts and images."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jinaclip.backends.selection import BACKENDS, PRECISIONS
from jinaclip.errors import InputError
from jinaclip.model import ClipModel
from jinaclip.preprocessing.image import RESIZE_MODES

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm"}


def add_bundle_arguments(parser: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", nargs=nargs, help="directory made by `jinaclip export`")
    what = "directory for self-test results, certificates and engines when the bundle is read-only"
    parser.add_argument("--cache", metavar="DIR", help=what)


def add_model_arguments(parser: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    add_bundle_arguments(parser, nargs=nargs)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="precision of the graphs")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="library that runs the graphs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="number of cores (default: all that this process may use)")


def add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", help="put this task's instruction before every text (default: none)")
    parser.add_argument("--truncate-dim", type=int, metavar="D", help="truncate vectors to D numbers (default: full)")
    parser.add_argument("--max-length", type=int, default=8192, metavar="N", help="truncate texts to N tokens")
    parser.add_argument("--resize-mode", choices=RESIZE_MODES, help="how images are resized (default: the bundle's)")
    parser.add_argument("--exif-transpose", action="store_true", help="rotate images by their EXIF orientation")


def open_model(args: argparse.Namespace, towers: Sequence[str]) -> ClipModel:
    where = {"backend": args.backend, "device": args.device, "threads": args.threads, "cache_dir": args.cache}
    return ClipModel(args.bundle, precision=args.precision, towers=towers, **where)


def read_texts(name: str) -> list[str | InputError]:
    """Read one text per line from a UTF-8 file, or from stdin if the name is "-".

    A blank line is an empty text, so that row numbers match the file.

    Returns:
        The texts, with an InputError for each line that is not UTF-8.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}; expected a text file with one text per line") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    texts: list[str | InputError] = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            texts.append(InputError(f"{name} line {number} is not UTF-8 at byte {error.start}; convert the file"))
    return texts


def find_images(words: Sequence[str]) -> list[str]:
    """Find image files by paths, glob patterns and directories. Directories are searched recursively.

    Raises:
        InputError: nothing is found for one of the words.
    """
    found: list[str] = []
    for word in words:
        expected = "a file, a directory or a pattern"
        if word[:5].lower() == "data:":
            files = [word]
        elif os.path.isdir(word):  # Path.is_dir raises an error for names that are too long
            paths = (path for path in Path(word).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            files = sorted(str(path) for path in paths if path.is_file())
            expected = f"images ({', '.join(sorted(IMAGE_SUFFIXES))})"
        else:
            files = [word] if os.path.exists(word) else sorted(glob.glob(word, recursive=True))
        if not files:
            shown = word if len(word) <= 200 else word[:200] + "…"
            raise InputError(f"--images {shown}: nothing found; expected {expected}")
        found += files
    return found


def words_of(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type for comma-separated words out of `allowed`."""

    def parse(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(text.split(",")))
        if not set(words) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text!r}, expected some of {','.join(allowed)}")
        return words

    return parse
