"""How far the exported model is from public implementations with the same weights; makes the table of docs/parity.md.

    python -m tests.support.parity            measure golden-tiny, small, full-width and odd (a minute)
    python -m tests.support.parity --full     the full-size random checkpoint too (6 minutes, 12 GB of memory)
    ... --write                       keep the figures in bench/results/parity.json and the table in docs/parity.md

The whole way is measured: text through the reference's own tokeniser call, photos through Pillow in the
publisher's order, then transformers and timm in eager fp32, against ClipModel on the exported bundle.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from jinaclip import ClipModel
from jinaclip.backends.onnxruntime.cpu import OnnxRuntimeSession
from jinaclip.preprocessing.image import ImagePreprocessing
from jinaclip_export.bundle.manifest import Identity
from jinaclip_export.bundle.writer import export_bundle
from jinaclip_export.checkpoint.random_weights import SIZES, published_config, write_random_checkpoint
from jinaclip_export.checkpoint.reader import Checkpoint
from jinaclip_export.onnx_export.graphs import export_image, export_text
from tests.conftest import PHOTOS, TEXTS
from tests.support.references import Floats, image_reference, text_reference, unit

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/parity.json"
MARKS = ("<!-- parity: made by `make parity` -->", "<!-- /parity -->")
GOLDEN = ROOT / "tests/data/golden-tiny"

# name -> (what it is, projection_dim, text settings, vision settings)
CONFIGURATIONS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "small": ("3 blocks, width 128, 140 px", 128, SIZES["small"]["text"], SIZES["small"]["vision"]),
    "full-width": (
        "2 blocks, width 1024, 512 px",
        1024,
        {"vocab_size": 36864, "num_hidden_layers": 2},
        {"layers": 2},
    ),
    "odd": (
        "1 and 4 blocks, width 120, heads of 24 and 40, 100 px, patch 16, two adapters",
        120,
        {
            "vocab_size": 30011, "hidden_size": 120, "num_hidden_layers": 4, "num_attention_heads": 5,
            "intermediate_size": 200, "rotary_emb_base": 10000.0, "layer_norm_eps": 1e-4, "lora_rank": 3,
            "lora_alpha": 5, "lora_adaptations": ["retrieval.query", "other"], "max_position_embeddings": 600,
        },
        {"width": 120, "layers": 1, "head_width": 40, "mlp_ratio": 3.1, "image_size": 100, "patch_size": 16,
         "pt_hw_seq_len": 7},
    ),
}  # fmt: skip


def measure(checkpoint: Path, bundle: Path) -> dict[str, dict[str, float]]:
    """Largest error of any component of a unit vector, and the distance that it is small against, by tower."""
    with ClipModel(bundle) as model:
        found = {"text": model.encode_text(TEXTS), "image": model.encode_image(PHOTOS)}
    return {
        "text": compare(found["text"], text_vectors(checkpoint, TEXTS)),
        "image": compare(found["image"], image_vectors(checkpoint, PHOTOS)),
    }


def text_vectors(checkpoint: Path, texts: list[str]) -> Floats:
    """Unit vectors of transformers' model, one text a batch: no padding, no packing."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    reference = text_reference(checkpoint)
    return unit(np.concatenate([reference(np.array([tokenizer.encode(text).ids])) for text in texts]))


def image_vectors(checkpoint: Path, photos: list[Path]) -> Floats:
    """Unit vectors of timm's model, one photo a batch."""
    reference = image_reference(checkpoint)
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    return unit(np.concatenate([reference(reference_pixels(Image.open(photo), settings)) for photo in photos]))


def reference_pixels(image: Image.Image, settings: dict[str, Any]) -> Floats:
    """float32 [1, 3, S, S] in the publisher's order: RGB, shortest side, centre, / 255, normalise."""
    size = settings["size"]
    image = image.convert("RGB")
    width, height = (int(size * n / min(image.size)) for n in image.size)
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)  # Pillow 12's order of the passes
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    pixels = (pixels - np.float32(settings["mean"])) / np.float32(settings["std"])
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def compare(found: Floats, expected: Floats) -> dict[str, float]:
    apart = np.linalg.norm(expected[:, None] - expected[None], axis=-1) + 9 * np.eye(len(expected))
    error = np.linalg.norm(found - expected, axis=1)
    return {
        "max_error": float(np.abs(found - expected).max()),
        "error_over_neighbour": float((error / apart.min(axis=1)).max()),
        "mean_abs_cosine": float(np.abs(expected @ expected.T)[~np.eye(len(expected), dtype=bool)].mean()),
    }


def golden_tiny() -> dict[str, dict[str, float]]:
    """Our graphs against outputs of the publisher's own code, on its inputs."""
    io = np.load(GOLDEN / "io.npz")
    checkpoint = Checkpoint(GOLDEN)
    preprocessing = ImagePreprocessing(size=70, mean=(0, 0, 0), std=(1, 1, 1))
    with tempfile.TemporaryDirectory() as directory:
        text, image = Path(directory) / "text.onnx", Path(directory) / "image.onnx"
        export_text(checkpoint.text_tower(), text)
        export_image(checkpoint.image_tower(), preprocessing, "float32", image)
        t = OnnxRuntimeSession(text).run({"input_ids": io["input_ids"]})
        i = OnnxRuntimeSession(image).run({"pixel_values": io["pixel_values"]})
    return {
        "text": compare(t["l2norm_text_embeddings"], unit(io["text_embeddings"])),
        "image": compare(i["l2norm_image_embeddings"], unit(io["image_embeddings"])),
    }


def make(name: str, directory: Path) -> tuple[Path, Path]:
    """Checkpoint and bundle of a configuration, in a directory."""
    if name == "full":
        config = published_config(**SIZES["full"])
    else:
        _, dim, text, vision = CONFIGURATIONS[name]
        config = published_config(dim, text, vision)
    checkpoint, bundle = directory / f"{name}-checkpoint", directory / f"{name}-bundle"
    write_random_checkpoint(checkpoint, config)
    export_bundle(Checkpoint(checkpoint), bundle, identity=Identity(name))
    return checkpoint, bundle


def render(results: list[dict[str, Any]]) -> str:
    """The table of docs/parity.md."""
    lines = [
        "| checkpoint | tower | reference | largest error | error ÷ distance to nearest | mean abs. cosine |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['checkpoint']} | {r['tower']} | {r['reference']} | {r['max_error']:.1e} | "
            f"{r['error_over_neighbour']:.1e} | {r['mean_abs_cosine']:.2f} |"
        )
    return "\n".join(lines)


def insert(page: str, table: str) -> str:
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []

    def add(checkpoint: str, references: dict[str, str], figures: dict[str, dict[str, float]]) -> None:
        for tower in ("text", "image"):
            rows.append({"checkpoint": checkpoint, "tower": tower, "reference": references[tower], **figures[tower]})

    add("golden-tiny", dict.fromkeys(("text", "image"), "the publisher's code"), golden_tiny())
    public = {"text": "transformers", "image": "timm"}
    for name in (*CONFIGURATIONS, *(["full"] if args.full else [])):
        about = CONFIGURATIONS[name][0] if name != "full" else "24 blocks, width 1024, 512 px"
        with tempfile.TemporaryDirectory() as directory:
            add(f"{name} ({about})", public, measure(*make(name, Path(directory))))
    print(render(rows))
    if args.write:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        page = ROOT / "docs/parity.md"
        page.write_text(insert(page.read_text("utf-8"), render(rows)), "utf-8")


if __name__ == "__main__":
    main()
