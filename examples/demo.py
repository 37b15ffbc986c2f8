"""Checkpoint to bundle to embeddings of real photos and sentences in several languages.

python examples/demo.py                         a small random checkpoint: quick and offline
python examples/demo.py jinaai/jina-clip-v2     the published weights, by hub id or directory
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import skimage

from jinaclip import ClipModel
from jinaclip.bundle.files import safe_name

PHOTOS = {
    "astronaut": "astronaut.png",
    "coffee": "coffee.png",
    "cat": "chelsea.png",
    "rocket": "rocket.jpg",
    "motorbike": "motorcycle_left.png",
}
SENTENCES = [
    "a portrait of an astronaut in a space suit",
    "une tasse de café sur une table",
    "一只猫的照片",
    "صاروخ على منصة الإطلاق",
    "ein Motorrad in einer Garage",
    "コーヒー",
    "gato",
]


def main() -> int:
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else None
    directory = Path("demo")
    directory.mkdir(exist_ok=True)
    bundle = directory / (safe_name(checkpoint) if checkpoint else "random-small")
    if not bundle.exists():
        source = [checkpoint] if checkpoint else ["--random", "small"]
        if checkpoint:
            print(
                "A full-size export takes up to 12 GB of memory, 3.5 GB of disk and some minutes.\n"
                "The published weights are 1.7 GB to download, under CC BY-NC 4.0: no commercial use."
            )
        print(f"$ jinaclip export {' '.join(source)} --output {bundle}", flush=True)
        done = subprocess.run([sys.executable, "-m", "jinaclip", "export", *source, "--output", str(bundle)])
        if done.returncode:
            return done.returncode
    start = time.perf_counter()
    with ClipModel(bundle) as model:
        opened = time.perf_counter() - start
        texts = model.encode_text(SENTENCES)
        images = model.encode_image([Path(skimage.__file__).parent / "data" / name for name in PHOTOS.values()])
        licence = model.bundle.model["licence"]
        random = str(model.bundle.model["id"]).startswith("random")
        print(f"\nopened and self-tested in {opened:.1f} s; vectors of {model.dims[-1]} numbers, {model.provenance}\n")
    table(model.similarity(texts, images))
    if random:
        print(
            "\n*** RANDOM WEIGHTS: THESE SIMILARITIES MEAN NOTHING. For real ones (licence CC BY-NC 4.0, 1.7 GB):"
            "\n***     make demo CHECKPOINT=jinaai/jina-clip-v2     (or a directory that holds the checkpoint)"
        )
    else:
        print(f"\nlicence of the weights: {licence or 'not stated'}")
    return 0


def table(similarity: np.ndarray) -> None:
    print("cosine     " + "".join(f"{name:>11}" for name in PHOTOS))
    for sentence, row in zip(SENTENCES, similarity, strict=True):
        best = int(row.argmax())
        cells = (f"{'*' if i == best else ''}{cosine:.3f}" for i, cosine in enumerate(row))
        print(" " * 11 + "".join(f"{cell:>11}" for cell in cells) + f"   {sentence}")


if __name__ == "__main__":
    sys.exit(main())
