"""The inputs of a bundle's self-test, with torch's fp32 vectors for them."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from jinaclip.preprocessing.image import ImagePreprocessing, preprocess
from jinaclip.preprocessing.text import TextTokenizer
from jinaclip_export.onnx_export.graphs import ImageGraph
from jinaclip_export.towers.image import ImageTower
from jinaclip_export.towers.text import TextTower

# The texts are short to keep the self-test fast, and use several scripts to test the tokenizer on more than English.
TEXTS = ("A beautiful sunset over the beach: 海滩上美丽的日落", "Καφές, кофе & قهوة no. 42")


def text_goldens(tower: TextTower, tokenizer: TextTokenizer) -> list[dict[str, Any]]:
    """Manifest entries of the text goldens, computed on the tower's device."""
    entries = []
    for text in TEXTS:
        ids = tokenizer.encode([text])[0][: tower.config.max_tokens]
        with torch.inference_mode():
            unit = F.normalize(tower(torch.tensor([ids], device=tower.cos.device)), dim=-1)[0]
        entries.append({"text": text, "input_ids": ids, "embedding": _base64(unit)})
    return entries


def image_goldens(tower: ImageTower, preprocessing: ImagePreprocessing, directory: Path) -> list[dict[str, Any]]:
    """Write the golden images to `directory` and return their manifest entries, computed on the tower's device."""
    entries = []
    graph = ImageGraph(tower, preprocessing).to(tower.cos.device)
    for index, image in enumerate(_pictures(preprocessing.size)):
        path = directory / f"golden-{index}.png"
        image.save(path, optimize=True)
        pixels = preprocess(path, preprocessing)
        with torch.inference_mode():
            unit = graph(torch.from_numpy(pixels[None]).to(tower.cos.device))[1][0]
        sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
        entries.append({"path": path.name, "pixels_sha256": sha256, "embedding": _base64(unit)})
    return entries


def _pictures(size: int) -> list[Image.Image]:
    """Two images of other sizes than the model's, so that the self-test covers both passes of the resize."""
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (9, 14, 3), np.uint8).repeat(size // 8 + 1, 0).repeat(size // 9 + 1, 1)
    y, x = np.mgrid[0 : 1.5 * size, 0 : 0.8 * size] / size
    waves = [np.sin(20 * (x + 0.2) ** 2 + 9 * y), np.sin(15 * y * x), np.cos(11 * (y - x))]
    rings = np.stack(waves, -1)
    return [Image.fromarray(blocks), Image.fromarray((np.round(rings * 7) * 18 + 128).astype(np.uint8))]


def _base64(unit: torch.Tensor) -> str:
    return base64.b64encode(unit.cpu().numpy().astype("<f4").tobytes()).decode()
