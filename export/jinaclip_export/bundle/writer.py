"""Export a checkpoint to a bundle. The output directory appears only when every step has succeeded."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinaclip.backends.base import Arrays
from jinaclip.bundle.files import new_directory
from jinaclip.bundle.manifest import PRECISION_CLASS, Bundle
from jinaclip.errors import BundleError, InputError, SelfTestFailed
from jinaclip.model import ClipModel
from jinaclip.preprocessing.image import normalise, preprocess
from jinaclip.preprocessing.text import TextTokenizer
from jinaclip.terminal import say
from jinaclip_engines.graph import delete
from jinaclip_engines.precision.lowering import write_precisions
from jinaclip_export.bundle.calibration_inputs import PROBE_TEXTS, probe_pictures
from jinaclip_export.bundle.goldens import image_goldens, text_goldens
from jinaclip_export.bundle.manifest import (
    Identity,
    add_image,
    add_text,
    listed,
    new_manifest,
    read_preprocessing,
    special_ids,
    write_manifest,
)
from jinaclip_export.bundle.source import Source
from jinaclip_export.checkpoint.reader import image_shapes, text_shapes
from jinaclip_export.errors import CheckpointError, ExportError
from jinaclip_export.onnx_export.graphs import export_image, export_text

WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}  # size of a weight


def export_bundle(
    source: Source,
    output: Path,
    *,
    identity: Identity,
    towers: Sequence[str] = ("text", "image"),
    precisions: Sequence[str] = ("fp32",),
    pixels: str = "uint8",
) -> Bundle:
    """Write a bundle.

    Args:
        source: the checkpoint to export, or another source.
        output: directory to create. It must not exist, or must be empty.
        identity: name, revision and licence of the model.
        towers: "text", "image" or both.
        precisions: any of "fp32", "fp16" and "int8". Without "fp32" the other precisions cannot be certified.
        pixels: input type of the image graph, "uint8" or the published "float32".

    Returns:
        The new bundle.

    Raises:
        CheckpointError: the checkpoint is invalid.
        ParityError: a graph differs from torch.
        ExportError: `output` cannot be written. After any of these errors, `output` has no partial files.
    """
    check_output(output)
    _check_disk(source, output, towers, precisions)
    source.check(towers)
    manifest = new_manifest(source, identity)
    with _new_bundle(output) as directory:
        writer = _TowerWriter(source, directory, manifest, precisions)
        if "text" in towers:
            writer.add_text()
        if "image" in towers:
            writer.add_image(pixels)
        say("hashes")
        manifest["files"] = {path.name: listed(path) for path in sorted(directory.iterdir())}
        write_manifest(directory, manifest)
        say("self-test")
        for precision in precisions:
            _self_test(directory, towers, precision)
        shutil.rmtree(directory / "selftest", ignore_errors=True)
    return Bundle(output)


@dataclass(frozen=True)
class _TowerWriter:
    """Writes the graphs and goldens of towers to a directory, and their sections to the manifest."""

    source: Source
    directory: Path
    manifest: dict[str, Any]
    precisions: Sequence[str]

    def add_text(self) -> None:
        config = self.source.config.text
        file = self.source.file("tokenizer.json")
        try:
            tokenizer = TextTokenizer(file, vocab_size=config.vocab_size, special_ids=special_ids(config))
        except BundleError as error:
            raise CheckpointError(str(error)) from error
        shutil.copyfile(file, self.directory / "tokenizer.json")
        say("text tower: reading the weights")
        tower = self.source.text_tower()
        with _timed("text tower: exporting"):
            self.manifest["parity"]["text"] = {"fp32": export_text(tower, self.directory / "text-fp32.onnx")}
        self.manifest["goldens"]["text"] = text_goldens(tower, tokenizer)
        add_text(self.manifest, config)
        del tower
        ids = [row[: config.max_tokens] for row in tokenizer.encode(PROBE_TEXTS)]
        self._add_graphs("text", [{"input_ids": tokenizer.padded([row])} for row in ids])

    def add_image(self, pixels: str) -> None:
        config, preprocessing = self.source.config.image, read_preprocessing(self.source)
        say("image tower: reading the weights")
        tower = self.source.image_tower()
        with _timed("image tower: exporting"):
            parity = export_image(tower, preprocessing, pixels, self.directory / "image-fp32.onnx")
        self.manifest["parity"]["image"] = {"fp32": parity}
        self.manifest["goldens"]["image"] = image_goldens(tower, preprocessing, self.directory)
        add_image(self.manifest, config, pixels)
        del tower
        batches = [preprocess(image, preprocessing)[None] for image in probe_pictures(config.image_size)]
        inputs = [{"pixel_values": normalise(b, preprocessing) if pixels == "float32" else b} for b in batches]
        self._add_graphs("image", inputs)

    def _add_graphs(self, tower: str, inputs: Sequence[Arrays]) -> None:
        """Write a tower's other precisions from its fp32 graph. Remove the fp32 graph if it was not requested."""
        fp32 = self.directory / f"{tower}-fp32.onnx"
        others = [precision for precision in self.precisions if precision != "fp32"]
        if others:
            with _timed(f"{tower} tower: {', '.join(others)}"):
                report = write_precisions(fp32, others, inputs, f"{tower}_embeddings", self.manifest["dims"])
            self.manifest["precisions"][tower] = report
        if "fp32" not in self.precisions:
            delete(fp32)
        graphs = {precision: f"{tower}-{precision}.onnx" for precision in PRECISION_CLASS}
        self.manifest["towers"][tower]["graphs"] = {p: name for p, name in graphs.items() if p in self.precisions}


def _self_test(directory: Path, towers: Sequence[str], precision: str) -> None:
    try:
        ClipModel(directory, towers=tuple(towers), precision=precision).close()
    except SelfTestFailed as error:
        if precision == "fp32":
            raise
        raise ExportError(
            f"{str(error).partition(';')[0]}; this checkpoint cannot be exported in {precision}: remove it "
            "from --precision; nothing was written"
        ) from error


@contextmanager
def _new_bundle(output: Path) -> Iterator[Path]:
    """A temporary directory that is renamed to `output` on success and removed on failure. Temporary directories of
    processes that were killed are removed.
    """
    for stale in output.parent.glob(f".{output.name}.partial-*"):
        owner = stale.name.rpartition("-")[2]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    try:
        with new_directory(output) as directory:
            yield directory
            for path in directory.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    except OSError as error:
        raise ExportError(f"cannot write {output}: {error.strerror or error}; partial files were removed") from error
    except InputError as error:
        raise ExportError(str(error)) from error


def check_output(output: Path) -> None:
    """Raise ExportError if `output` has content that would be overwritten, or if its parent does not exist."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output} already exists; choose another --output or remove it first")
    if not output.parent.is_dir():
        raise ExportError(f"{output.parent} is not a directory; create it first or choose another --output")


def _check_disk(source: Source, output: Path, towers: Sequence[str], precisions: Sequence[str]) -> None:
    config = source.config
    shapes = {"text": text_shapes(config.text), "image": image_shapes(config.image)}
    weights = sum(math.prod(shape) for tower in towers for name, shape in shapes[tower].items() if "lora_" not in name)
    # The fp32 graphs are always written, because the other precisions are made from them.
    needed = weights * sum(WEIGHT_BYTES[precision] for precision in {"fp32", *precisions}) + (64 << 20)
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ExportError(
            f"{output.parent} has {free / 1e9:.1f} GB free, the bundle needs {needed / 1e9:.1f} GB; "
            "free disk space or choose another --output"
        )


@contextmanager
def _timed(what: str) -> Iterator[None]:
    say(what)
    start = time.monotonic()
    yield
    say(f"{what}: {time.monotonic() - start:.0f} s")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
