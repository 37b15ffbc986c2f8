"""The table of named cases and suites, and the inputs of the cases."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from jinaclip.bundle.manifest import Bundle

PHOTO_SIZE = (1920, 1080)
SHIFT = 113  # columns by which each photo is shifted from the one before; a prime, so many photos are different
# Three languages and scripts, to measure the tokenizer on more than English.
QUERY = "A cup of coffee on a wooden table, 木桌上的一杯咖啡, فنجان قهوة على طاولة خشبية"


@dataclass(frozen=True)
class Case:
    """A benchmark case.

    Attributes:
        name: name in --cases and in the records.
        kind: kind of measurement, one of jinaclip_bench.scenarios.in_process.KINDS.
        tower: "text" or "image".
        summary: description for --help.
        rows: number of texts or images in a call.
        tokens: number of tokens of each text, `<s>` and `</s>` included; for a mix, the largest number; None if the
            case's text or image determines it.
        median, sigma: for a mix, the median of the token counts and the standard deviation of their logarithm.
        clients: number of concurrent clients of a server.
    """

    name: str
    kind: str
    tower: str
    summary: str
    rows: int = 1
    tokens: int | None = None
    median: int | None = None
    sigma: float | None = None
    clients: int | None = None


def _mix(name: str, summary: str, rows: int, longest: int, sigma: float) -> Case:
    """A case of texts whose token counts have a log-normal distribution with a median of 30."""
    return Case(name, "mix", "text", summary, rows=rows, tokens=longest, median=30, sigma=sigma)


_SERVED_TEXTS = "512 texts, median 16 tokens (the longest has 128); 32 clients"
# Cases in the order in which they run. Cases of one tower are adjacent, so that the tower is loaded once.
_CASES = (
    Case("text-1x32", "graph", "text", "one text of 32 tokens", tokens=32),
    Case("text-8x128", "graph", "text", "a batch of 8 texts of 128 tokens", rows=8, tokens=128),
    Case("text-query", "encode", "text", "a short multilingual query, tokenizer included"),
    _mix("mix-512", "64 texts, log-normal: median 30 tokens, sigma 0.8, at most 512; with tokenizer", 64, 512, 0.8),
    # With sigma 0.8 none of the 64 texts would exceed 208 tokens, and the mix would be the same as mix-512.
    _mix("mix-2048", "the same with sigma 1.2, at most 2048 (the longest has 546)", 64, 2048, 1.2),
    # 64 texts are too few to keep a GPU busy, and none of them is near the limit.
    _mix("bulk-512", "1024 texts as in mix-512 (the longest has 419)", 1024, 512, 0.8),
    _mix("bulk-2048", "1024 texts as in mix-2048 (the longest has 1568)", 1024, 2048, 1.2),
    Case("image-1", "graph", "image", "one image, from its pixels"),
    Case("image-32", "graph", "image", "32 images, from their pixels", rows=32),
    Case("image-preprocess", "preprocess", "image", "a 1920 x 1080 JPEG to pixels: decode and resize"),
    Case(
        "query-dummy-image", "query", "text", "a text of 32 tokens, also in a fused graph with a dummy image", tokens=32
    ),
    Case("text-8192", "long", "text", "one text of 8192 tokens: time, and memory added by the call", tokens=8192),
    Case("process-text", "process", "text", "a new process until its first text vector, and its memory"),
    Case("process-image", "process", "image", "a new process until its first image vector, and its memory"),
    Case("serve-texts", "serve", "text", _SERVED_TEXTS, rows=512, tokens=128, median=16, sigma=0.8, clients=32),
    Case("serve-images", "serve", "image", "16 JPEGs of 1920 x 1080, 8 clients", rows=16, clients=8),
    # These run last, because a profiler may slow down later measurements in the same process.
    Case("stages-text", "stages", "text", "one text of 32 tokens, time by stage", tokens=32),
    Case("stages-image", "stages", "image", "a 1920 x 1080 JPEG, time by stage"),
)
CASES = {case.name: case for case in _CASES}

AUTOTUNED_CASE = "image-32"  # the only case that measures torch's max-autotune
ON_GPU = ("graph", "mix", "preprocess", "stages")  # kinds that can measure a GPU; the others measure only the CPU
WITHOUT_TORCH = ("preprocess", "long", "serve", "stages")  # kinds that do not measure torch
MAX_ROUNDS = {"mix": 5, "long": 3, "process": 3, "serve": 9, "stages": 5}  # of kinds whose rounds are slow

_TEXTS = ("text-1x32", "text-8x128", "text-query")
_PROCESSES = ("process-text", "process-image")
_STAGES = ("stages-text", "stages-image")
SUITES = {
    "basic": (*_TEXTS, "image-1", "image-preprocess", *_PROCESSES),
    "cpu": (*_TEXTS, "mix-512", "mix-2048", "image-1", "query-dummy-image", "text-8192", *_PROCESSES),
    "gpu": ("text-1x32", "mix-512", "mix-2048", "bulk-512", "bulk-2048", "image-1", "image-32", *_STAGES),
    "server": ("serve-texts", "serve-images"),
}


def random_ids(bundle: Bundle, rows: int, tokens: int) -> np.ndarray:
    """int64 [rows, tokens] of ordinary tokens between `<s>` and `</s>`, without padding. The same in every run."""
    special = set(bundle.special_ids.values())
    ordinary = np.array([i for i in range(bundle.vocab_size) if i not in special], np.int64)
    ids = np.random.default_rng(0).choice(ordinary, (rows, tokens))
    ids[:, 0], ids[:, -1] = bundle.special_ids["bos"], bundle.special_ids["eos"]
    return ids


@cache
def photo_jpeg(number: int = 0) -> bytes:
    """A JPEG of PHOTO_SIZE with about the decoding cost of a photo. Each number gives a differently shifted image."""
    file = io.BytesIO()
    Image.fromarray(np.roll(_photo(), number * SHIFT, axis=1)).save(file, "JPEG", quality=90)
    return file.getvalue()


@cache
def _photo() -> np.ndarray:
    """uint8 [height, width, 3]: smooth random shapes at several scales, similar to a natural photo."""
    rng = np.random.default_rng(0)
    width, height = PHOTO_SIZE
    photo = np.full((height, width, 3), 128, np.float32)
    for cells in (4, 12, 36, 108, 324, 972):
        amplitude = 60 * (4 / cells) ** 0.4
        for channel in range(3):
            noise = rng.normal(0, amplitude, (cells * height // width + 1, cells)).astype(np.float32)
            photo[..., channel] += np.asarray(Image.fromarray(noise).resize(PHOTO_SIZE, Image.Resampling.BICUBIC))
    pixels: np.ndarray = photo.clip(0, 255).astype(np.uint8)
    return pixels
