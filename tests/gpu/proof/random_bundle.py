"""A checkpoint with random weights and its bundle, made where they are used: from a kit's topology, in seconds.

`jinaclip export` needs minutes for the full size: it traces the towers, and runs them on the CPU to see how large
their values get. Here the graphs are carried without weights, the vectors of the self-test come from torch on the
device, and float16 takes every layer, as it did for these weights when they were exported.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.bundle.manifest import TOWERS
from jinaclip.preprocessing.text import TextTokenizer
from jinaclip_engines.precision.lowering import lower
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
from jinaclip_export.checkpoint.random_weights import write_random_checkpoint
from jinaclip_export.checkpoint.reader import Checkpoint
from tests.gpu.proof.topology import fill_topology
from tests.gpu.proof.towers import exact_products

PRECISIONS = ("fp32", "fp16")
SEED = 20
IDENTITY = Identity("random", f"seed-{SEED}", "none: random weights")


def make(topology: Path, directory: Path, device: str) -> dict[str, float]:
    """Write directory/checkpoint and directory/bundle.

    Args:
        topology: config.json and the graphs of one size, from the kit.
        directory: made; what is in it is removed.
        device: of torch, "cuda" or "cpu": where weights are drawn and the self-test's vectors computed.

    Returns:
        Seconds by step.
    """
    shutil.rmtree(directory, ignore_errors=True)
    bundle = directory / "bundle"
    bundle.mkdir(parents=True)
    seconds: dict[str, float] = {}
    with _timed(seconds, "weights"):
        config = json.loads((topology / "config.json").read_text("utf-8"))
        write_random_checkpoint(directory / "checkpoint", config, seed=SEED, device=device)
    with _timed(seconds, "graphs"), ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        towers = {
            tower: pool.submit(write_tower, tower, directory / "checkpoint", topology, bundle, device)
            for tower in TOWERS
        }
        checkpoint = Checkpoint(directory / "checkpoint")
        manifest = new_manifest(checkpoint, IDENTITY)
        add_text(manifest, checkpoint.config.text)
        add_image(manifest, checkpoint.config.image, "uint8")
        shutil.copyfile(checkpoint.file("tokenizer.json"), bundle / "tokenizer.json")
        files = {"tokenizer.json": listed(bundle / "tokenizer.json")}
        for tower, future in towers.items():
            made = future.result()
            manifest["goldens"][tower], manifest["precisions"][tower] = made["goldens"], {"fp16": made["fp16"]}
            manifest["towers"][tower]["graphs"] = {p: f"{tower}-{p}.onnx" for p in PRECISIONS}
            files |= made["files"]
            seconds |= {f"{tower}: {step}": value for step, value in made["seconds"].items()}
    manifest["files"] = dict(sorted(files.items()))
    write_manifest(bundle, manifest)
    return seconds


def write_tower(tower: str, checkpoint_path: Path, topology: Path, bundle: Path, device: str) -> dict[str, Any]:
    """The graphs and self-test vectors of one tower, into the bundle's folder; what the manifest says of them."""
    seconds: dict[str, float] = {}
    checkpoint = Checkpoint(checkpoint_path)
    with _timed(seconds, "read"):
        module = checkpoint.text_tower() if tower == "text" else checkpoint.image_tower()
    fp32, fp16 = (bundle / f"{tower}-{precision}.onnx" for precision in PRECISIONS)
    with _timed(seconds, "fp32"):
        fill_topology(topology / fp32.name, module, fp32)
    with _timed(seconds, "fp16"):
        found = lower(fp32, fp16, "fp16", _Small(), ())
    with _timed(seconds, "self-test"):
        exact_products()
        module = module.to(device)
        if tower == "text":
            config = checkpoint.config.text
            source = checkpoint.file("tokenizer.json")
            tokenizer = TextTokenizer(source, vocab_size=config.vocab_size, special_ids=special_ids(config))
            goldens = text_goldens(module, tokenizer)  # type: ignore[arg-type]
        else:
            goldens = image_goldens(module, read_preprocessing(checkpoint), bundle)  # type: ignore[arg-type]
    with _timed(seconds, "hashes"):
        pictures = [bundle / golden["path"] for golden in goldens if "path" in golden]
        paths = [path for graph in (fp32, fp16) for path in (graph, graph.with_name(f"{graph.name}.data"))]
        files = {path.name: listed(path) for path in (*paths, *pictures)}
    return {"goldens": goldens, "fp16": found, "files": files, "seconds": seconds}


class _Small(Mapping[str, np.ndarray]):
    """Ranges of layers: all small, so that every layer becomes float16."""

    def __getitem__(self, name: str) -> np.ndarray:
        return np.ones(1, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[step] = round(time.monotonic() - start, 2)
