"""Measure the precisions on trained weights. Needs the network the first time, then its cache.

python -m tests.trained            print the tables
python -m tests.trained --write    write bench/results/trained.json and docs/trained.md too (make trained)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from jinaclip.preprocessing.text import TextTokenizer
from jinaclip_export.bundle.manifest import special_ids
from jinaclip_export.certification.inputs import Items, images_of, texts_of
from tests.trained import e5, minilm
from tests.trained.bert import Reference
from tests.trained.dino import open_dino
from tests.trained.fetch import FetchError
from tests.trained.inputs import pictures, texts
from tests.trained.mapped import MappedModel
from tests.trained.measure import measure
from tests.trained.table import MODELS, PAGE, RESULTS, page

Opened = tuple[MappedModel, Reference, Items, dict[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], help="(default: all)")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--threads", type=int, help="number of cores (default: all that this process may use)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in args.names or MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            model, reference, items, languages = OPEN[name](Path(scratch))
            found = measure(model, reference, items, Path(scratch), args.threads) | {"languages": languages}
        print(page({name: found}))
        if args.write:
            write(name, found)


def write(name: str, found: Mapping[str, Any]) -> None:
    """Write the result of one model to the results, and the page."""
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    results = {model: (results | {name: found})[model] for model in MODELS if model in {*results, name}}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(results), "utf-8")


def open_minilm(scratch: Path) -> Opened:
    model, reference = minilm.open_minilm(scratch)
    return (model, reference, *text_items(model, minilm.UNKNOWN, scratch))


def open_e5(scratch: Path) -> Opened:
    model, unknown, reference = e5.open_e5(scratch)
    return (model, reference, *text_items(model, unknown, scratch))


def open_dino_with_pictures(scratch: Path) -> Opened:
    model, reference = open_dino(scratch)
    directory = scratch / "pictures"
    directory.mkdir()
    for name, picture in pictures().items():
        picture.save(directory / f"{name}.ppm")
    return model, reference, images_of(str(directory)), {}


OPEN: dict[str, Callable[[Path], Opened]] = {
    "MiniLM": open_minilm,
    "E5": open_e5,
    "DINO": open_dino_with_pictures,
}


def text_items(model: MappedModel, unknown: int, scratch: Path) -> tuple[Items, dict[str, int]]:
    """The texts for a model, and their number by language."""
    config = model.config.text
    tokenizer = TextTokenizer(
        model.file("tokenizer.json"), vocab_size=config.vocab_size, special_ids=special_ids(config)
    )
    prefix = config.task_instructions.get(config.default_instruction_task or "", "")
    chosen = texts(tokenizer, unknown, prefix=prefix)
    file = scratch / "texts.txt"
    file.write_text("".join(f"{text}\n" for lines in chosen.values() for text in lines), "utf-8")
    return texts_of(str(file)), {language: len(lines) for language, lines in chosen.items() if lines}


if __name__ == "__main__":
    try:
        main()
    except FetchError as error:
        sys.exit(f"error: {error}")
