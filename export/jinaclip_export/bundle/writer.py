"""Export a checkpoint to a bundle. The output directory appears only when every step has succeeded."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jinaclip.backends.base import Arrays
from jinaclip.bundle.manifest import PRECISION_CLASS, Bundle
from jinaclip.errors import BundleError, InputError, SelfTestFailed
from jinaclip.model import ClipModel
from jinaclip.preprocessing.image import ImagePreprocessing, normalise, preprocess
from jinaclip.preprocessing.text import TextTokenizer
from jinaclip.terminal import say
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
from jinaclip_export.checkpoint.reader import Checkpoint, image_shapes, text_shapes
from jinaclip_export.errors import CheckpointError, ExportError
from jinaclip_export.onnx_export.graphs import export_image, export_text

PIXELS = ("uint8", "float32")
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}  # size of a weight


def export_bundle(
    checkpoint: Checkpoint,
    output: Path,
    *,
    identity: Identity,
    towers: Sequence[str] = ("text", "image"),
    precisions: Sequence[str] = ("fp32",),
    pixels: str = "uint8",
) -> Bundle:
    """Write a bundle.

    Args:
        checkpoint: the checkpoint to export.
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
    _check_disk(checkpoint, output, towers, precisions)
    checkpoint.check(towers)
    preprocessing = read_preprocessing(checkpoint)
    manifest = new_manifest(checkpoint, identity)
    with _new_directory(output) as directory:
        if "text" in towers:
            _add_text(checkpoint, directory, manifest, precisions)
        if "image" in towers:
            _add_image(checkpoint, preprocessing, directory, manifest, precisions, pixels)
        say("hashes")
        manifest["files"] = {path.name: listed(path) for path in sorted(directory.iterdir())}
        write_manifest(directory, manifest)
        say("self-test")
        for precision in precisions:
            try:
                ClipModel(directory, towers=tuple(towers), precision=precision).close()
            except SelfTestFailed as error:
                if precision == "fp32":
                    raise
                raise ExportError(
                    f"{str(error).partition(';')[0]}; this checkpoint cannot be exported in {precision}: remove it "
                    "from --precision; nothing was written"
                ) from error
        shutil.rmtree(directory / "selftest", ignore_errors=True)
    return Bundle(output)


def _add_text(checkpoint: Checkpoint, directory: Path, manifest: dict[str, Any], precisions: Sequence[str]) -> None:
    config = checkpoint.config.text
    source = checkpoint.file("tokenizer.json")
    try:
        tokenizer = TextTokenizer(source, vocab_size=config.vocab_size, special_ids=special_ids(config))
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    shutil.copyfile(source, directory / "tokenizer.json")
    say("text tower: reading the weights")
    tower = checkpoint.text_tower()
    with _timed("text tower: exporting"):
        manifest["parity"]["text"] = {"fp32": export_text(tower, directory / "text-fp32.onnx")}
    manifest["goldens"]["text"] = text_goldens(tower, tokenizer)
    add_text(manifest, config)
    del tower
    ids = [row[: config.max_tokens] for row in tokenizer.encode(list(PROBE_TEXTS))]
    _add_graphs("text", directory, manifest, precisions, [{"input_ids": tokenizer.padded([row])} for row in ids])


def _add_graphs(
    tower: str, directory: Path, manifest: dict[str, Any], precisions: Sequence[str], inputs: Sequence[Arrays]
) -> None:
    """Write a tower's other precisions from its fp32 graph. Remove the fp32 graph if it was not requested."""
    fp32 = directory / f"{tower}-fp32.onnx"
    others = [precision for precision in precisions if precision != "fp32"]
    if others:
        with _timed(f"{tower} tower: {', '.join(others)}"):
            manifest["precisions"][tower] = write_precisions(
                fp32, others, inputs, f"{tower}_embeddings", manifest["dims"]
            )
    if "fp32" not in precisions:
        fp32.unlink()
        fp32.with_name(f"{fp32.name}.data").unlink()
    manifest["towers"][tower]["graphs"] = {p: f"{tower}-{p}.onnx" for p in PRECISION_CLASS if p in precisions}


def _add_image(
    checkpoint: Checkpoint, preprocessing: ImagePreprocessing, directory: Path, manifest: dict[str, Any],
    precisions: Sequence[str], pixels: str,
) -> None:  # fmt: skip
    config = checkpoint.config.image
    say("image tower: reading the weights")
    tower = checkpoint.image_tower()
    with _timed("image tower: exporting"):
        parity = export_image(tower, preprocessing, pixels, directory / "image-fp32.onnx")
    manifest["parity"]["image"] = {"fp32": parity}
    manifest["goldens"]["image"] = image_goldens(tower, preprocessing, directory)
    add_image(manifest, config, pixels)
    batches = [preprocess(image, preprocessing)[None] for image in probe_pictures(config.image_size)]
    inputs = [{"pixel_values": normalise(b, preprocessing) if pixels == "float32" else b} for b in batches]
    del tower
    _add_graphs("image", directory, manifest, precisions, inputs)


@contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A temporary directory that is renamed to `output` on success and removed on failure."""
    check_output(output)
    for stale in output.parent.glob(f".{output.name}.partial-*"):
        owner = stale.name.rpartition("-")[2]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if output.exists():
            output.rmdir()  # check_output verified that it is empty
        os.rename(partial, output)
    except OSError as error:
        raise ExportError(f"cannot write {output}: {error.strerror or error}; partial files were removed") from error
    except InputError as error:
        raise ExportError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(output: Path) -> None:
    """Raise ExportError if `output` has content that would be overwritten, or if its parent does not exist."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output} already exists; choose another --output or remove it first")
    if not output.parent.is_dir():
        raise ExportError(f"{output.parent} is not a directory; create it first or choose another --output")


def _check_disk(checkpoint: Checkpoint, output: Path, towers: Sequence[str], precisions: Sequence[str]) -> None:
    check_output(output)
    config = checkpoint.config
    shapes = (text_shapes(config.text) if "text" in towers else {}) | (
        image_shapes(config.image) if "image" in towers else {}
    )
    numbers = 0
    for name, shape in shapes.items():
        count = 1
        for side in shape:
            count *= side
        numbers += count if "lora_" not in name else 0
    # The fp32 graphs are always written, because the other precisions are made from them.
    needed = numbers * sum(BYTES[precision] for precision in {"fp32", *precisions}) + (64 << 20)
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
    with suppress(ProcessLookupError, OverflowError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        return True
    return False
