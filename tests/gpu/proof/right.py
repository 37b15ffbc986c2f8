"""Part "right": the vectors of both towers against torch's, and what must hold however they are asked for."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jinaclip import ClipModel
from jinaclip.embeddings import truncate
from jinaclip.preprocessing.image import ImagePreprocessing
from jinaclip_bench.sides.torch_towers import ImagesOfPixels, TextsOfIds
from jinaclip_export.onnx_export.graphs import ImageGraph
from tests.gpu.proof import ours
from tests.gpu.proof.context import Context
from tests.gpu.proof.timing import cosines
from tests.gpu.proof.towers import exact_products, image_tower, text_tower

LENGTHS = (3, 5, 9, 16, 17, 24, 33, 48, 60, 64, 77, 120, 128, 200, 300, 512)
IMAGES = 8
CALLS, THREADS = 1000, 8
ENOUGH = 0.9998  # cosine of fp16 with fp32


def run(context: Context) -> None:
    """All checks of each way that graphs are prepared."""
    exact_products()
    failed = []
    for number, (way, library) in enumerate(ours.ways(context).items()):
        ours.choose(library)
        wrong = _way(context, way, whole=number == 0)
        failed += [f"{way}: {name}" for name in wrong]
        if {"open", "text", "image"} & set(wrong):
            ours.leave_out(context, way, f"failed: {', '.join(wrong)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _way(context: Context, way: str, *, whole: bool) -> list[str]:
    """Names of the checks that failed; only the vectors are looked at where it is not `whole`."""
    start = time.monotonic()
    try:
        model = ClipModel(context.bundle, backend="onnxruntime", device="cuda", precision="fp16", self_test="always")
    except Exception as error:
        context.record(f"{way}: open", error=f"{type(error).__name__}: {error}"[:500])
        return ["open"]
    with model:
        context.record(f"{way}: open", seconds=round(time.monotonic() - start, 1), towers=model.info()["towers"])
        ids, pixels = _inputs(context, model)
        checks: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            ("text", lambda: _text(context, model, ids)),
            ("image", lambda: _image(context, model, pixels)),
        ]
        if whole:
            checks += [
                ("replays", lambda: _replays(model, ids, pixels)),
                ("threads", lambda: _threads(model, ids, pixels)),
                ("thousand calls", lambda: _thousand_calls(context, model, ids, pixels)),
                ("fp32", lambda: _fp32(context, ids, pixels)),
            ]
        return [name for name, check in checks if not _passes(context, f"{way}: {name}", check)]


def _passes(context: Context, name: str, check: Callable[[], dict[str, Any]]) -> bool:
    try:
        facts = check()
    except Exception as error:  # the next check still runs
        context.record(name, error=f"{type(error).__name__}: {error}"[:500])
        return False
    context.record(name, **facts)
    found = [facts[key] for key in ("cosine", "one_by_one", "text", "image") if key in facts]
    return context.dry_run or all(value >= ENOUGH for value in found)  # NaN is not


def _inputs(context: Context, model: ClipModel) -> tuple[list[list[int]], np.ndarray]:
    """Texts of LENGTHS as ids, and images uint8 [IMAGES, S, S, 3]: noise, flat, and soft shapes."""
    rng = np.random.default_rng(1)
    special = model.bundle.special_ids
    ordinary = np.array([i for i in range(model.bundle.vocab_size) if i not in set(special.values())])
    ids = [[special["bos"], *map(int, rng.choice(ordinary, n - 2)), special["eos"]] for n in LENGTHS]
    size = model.bundle.preprocessing.size
    coarse = rng.integers(0, 256, (IMAGES - 2, 9, 9, 3), np.uint8)
    soft = coarse.repeat(size // 9 + 1, 1).repeat(size // 9 + 1, 2)[:, :size, :size]
    noise = rng.integers(0, 256, (1, size, size, 3), np.uint8)
    flat = np.full((1, size, size, 3), 128, np.uint8)
    return ids[: 6 if context.dry_run else None], np.concatenate([soft, noise, flat])


@cache
def _expected_texts(checkpoint: Path, device: str, padded: bytes, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw vectors from torch in float32, and in float16."""
    ids = torch.from_numpy(np.frombuffer(padded, np.int64).reshape(rows, -1).copy()).to(device)
    tower = text_tower(checkpoint, device, torch.float32)
    with torch.inference_mode():
        expected = tower(ids).cpu().numpy()
        return expected, TextsOfIds(tower.to(torch.float16))(ids, True).cpu().numpy()


@cache
def _expected_images(
    checkpoint: Path, device: str, preprocessing: ImagePreprocessing, pixels: bytes
) -> tuple[np.ndarray, np.ndarray]:
    size = preprocessing.size
    placed = torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(-1, size, size, 3).copy()).to(device)
    tower = image_tower(checkpoint, device, torch.float32)
    graph = ImageGraph(tower, preprocessing).to(device)
    with torch.inference_mode():
        expected = torch.cat([graph(part)[0] for part in torch.split(placed, 4)]).cpu().numpy()
        return expected, ImagesOfPixels(tower.to(torch.float16), graph.mean, graph.std)(placed).cpu().numpy()


def _text(context: Context, model: ClipModel, ids: list[list[int]]) -> dict[str, Any]:
    """Padded in one batch, and one by one."""
    padded = _padded(ids, model.bundle.special_ids["pad"])
    expected, half = _expected_texts(context.model / "checkpoint", context.device, padded.tobytes(), len(padded))
    alone = np.concatenate([model.text_encoder.run([row]) for row in ids])
    return _agreement(model, expected, half, model.text_encoder.run(ids), alone)


def _image(context: Context, model: ClipModel, pixels: np.ndarray) -> dict[str, Any]:
    preprocessing = model.bundle.preprocessing
    expected, half = _expected_images(context.model / "checkpoint", context.device, preprocessing, pixels.tobytes())
    alone = np.concatenate([model.image_encoder.run([picture]) for picture in pixels])
    return _agreement(model, expected, half, model.image_encoder.run(list(pixels)), alone)


def _agreement(
    model: ClipModel, expected: np.ndarray, half: np.ndarray, found: np.ndarray, alone: np.ndarray
) -> dict[str, Any]:
    """Smallest cosine with torch's float32 at every dim, beside that of torch's float16."""
    dims = model.dims
    mine = {dim: float(cosines(truncate(found, dim), truncate(expected, dim)).min()) for dim in dims}
    theirs = {dim: float(cosines(truncate(half, dim), truncate(expected, dim)).min()) for dim in dims}
    others = cosines(expected[:-1], expected[1:])
    return {
        "cosine": min(mine.values()),
        "one_by_one": min(float(cosines(truncate(alone, dim), truncate(expected, dim)).min()) for dim in dims),
        "torch_fp16": min(theirs.values()),
        "dims": {str(dim): round(1 - value, 9) for dim, value in mine.items()},
        "torch_dims": {str(dim): round(1 - value, 9) for dim, value in theirs.items()},
        "neighbours": float(np.median(others)),
        "largest_norm_error": float(np.abs(np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1) - 1).max()),
    }


def _replays(model: ClipModel, ids: list[list[int]], pixels: np.ndarray) -> dict[str, Any]:
    """Every shape five times: the first run, the captured one and replays, with other shapes between them."""
    shapes = [(rows, tokens) for rows in (1, 2, 4, 8) for tokens in (16, 32, 64, 128)]
    first: dict[str, np.ndarray] = {}
    apart = 0.0
    for _ in range(5):
        for rows, tokens in shapes:
            batch = [(row * (tokens // len(row) + 1))[:tokens] for row in ids[:rows]]
            found = model.text_encoder.run(batch)
            apart = max(apart, float(np.abs(found - first.setdefault(f"{rows} x {tokens}", found)).max()))
        for rows in (1, 2, 4, 8):
            found = model.image_encoder.run(list(pixels[:rows]))
            apart = max(apart, float(np.abs(found - first.setdefault(f"{rows} images", found)).max()))
    return {"shapes": len(first), "largest_difference": apart}


def _threads(model: ClipModel, ids: list[list[int]], pixels: np.ndarray) -> dict[str, Any]:
    """Texts and images from several threads at once: each gets its own vectors."""
    texts = F.normalize(
        torch.from_numpy(np.concatenate([model.text_encoder.run([row]) for row in ids])), dim=-1
    ).numpy()
    images = F.normalize(torch.from_numpy(model.image_encoder.run(list(pixels))), dim=-1).numpy()

    def encode(number: int) -> float:
        if number % 5 == 0:
            index = number % len(pixels)
            return float(cosines(model.image_encoder.run([pixels[index]]), images[index : index + 1])[0])
        first = number % len(ids)
        part = ids[first : first + 1 + number % 3]
        return float(cosines(model.text_encoder.run(part), texts[first : first + len(part)]).min())

    start = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        worst = min(pool.map(encode, range(240)))
    return {"cosine": worst, "threads": THREADS, "calls": 240, "seconds": round(time.monotonic() - start, 2)}


def _thousand_calls(context: Context, model: ClipModel, ids: list[list[int]], pixels: np.ndarray) -> dict[str, Any]:
    def call(number: int) -> None:
        model.text_encoder.run([ids[number % len(ids)]])
        if number % 20 == 0:
            model.image_encoder.run([pixels[number % len(pixels)]])

    for number in range(4 * len(ids)):
        call(number)
    device, host = _memory(context)
    start = time.monotonic()
    for number in range(CALLS):
        call(number)
    more_device, more_host = _memory(context)
    return {
        "calls": CALLS, "seconds": round(time.monotonic() - start, 2),
        "device_mib": round((more_device - device) / 2**20, 1), "host_mib": round((more_host - host) / 2**20, 1),
    }  # fmt: skip


def _memory(context: Context) -> tuple[int, int]:
    """Bytes in use on the device and in this process."""
    used = 0
    if context.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        used = total - free
    return used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _fp32(context: Context, ids: list[list[int]], pixels: np.ndarray) -> dict[str, Any]:
    """The bundle's fp32 graphs on the GPU, as they are."""
    with ClipModel(context.bundle, backend="onnxruntime", device="cuda", precision="fp32") as model:
        padded = _padded(ids, model.bundle.special_ids["pad"])
        checkpoint, pixel_bytes = context.model / "checkpoint", pixels.tobytes()
        texts, _ = _expected_texts(checkpoint, context.device, padded.tobytes(), len(padded))
        images, _ = _expected_images(checkpoint, context.device, model.bundle.preprocessing, pixel_bytes)
        return {
            "text": float(cosines(model.text_encoder.run(ids), texts).min()),
            "image": float(cosines(model.image_encoder.run(list(pixels)), images).min()),
        }


def _padded(ids: list[list[int]], pad: int) -> np.ndarray:
    padded = np.full((len(ids), max(map(len, ids))), pad, np.int64)
    for number, row in enumerate(ids):
        padded[number, : len(row)] = row
    return padded
