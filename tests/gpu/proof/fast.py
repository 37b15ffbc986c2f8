"""Parts "fast-…" and "warm-…": our sessions against torch, in turn; and torch's compiler run before, for its cache.

A side is measured as soon as it is ready, and all of them again when the next one is: a part that is stopped has told
what it had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch

from jinaclip.backends import choose_place
from jinaclip.bundle import Bundle
from jinaclip.image import ImagePreprocessing
from jinaclip_bench.cases import random_ids
from jinaclip_bench.flops import flops_of_images, flops_of_texts
from jinaclip_bench.texts import log_normal_lengths
from jinaclip_export.checkpoint import Checkpoint
from tests.gpu.proof.context import Context
from tests.gpu.proof.sides import image_sides, in_batches, session_side, text_sides
from tests.gpu.proof.timing import cosines, in_turn, product_rate
from tests.gpu.proof.towers import empty_towers, image_tower, text_tower

OURS = "jinaclip fp16 onnxruntime"
TOKENS = 32
MIXES = (512, 1024)  # texts
MEDIAN, SIGMA, LONGEST = 30, 0.8, 512
Embed = Callable[[np.ndarray], np.ndarray]
MakeSide = Callable[[], Any]


def image_32(context: Context) -> None:
    _images(context, 4 if context.dry_run else 32)


def image_1(context: Context) -> None:
    _images(context, 1)


def text_1(context: Context) -> None:
    bundle = Bundle(context.bundle)
    ids = random_ids(bundle, 1, TOKENS)
    tower = text_tower(context.model / "checkpoint", context.device, torch.float16)
    work = {"texts": 1, "tokens": ids.size, "flops": flops_of_texts(bundle.tower("text"), [TOKENS])}
    with our_session(bundle, "text") as session:
        ours = session_side(session, bundle.tower("text"))
        sides = ((name, _on(make, ids)) for name, make in text_sides(tower, context.device, dynamic=False))
        _compare(context, "text 1 x 32", partial(ours, ids), sides, work)


def mix(context: Context) -> None:
    """Texts of log-normal lengths, from their ids."""
    bundle = Bundle(context.bundle)
    manifest, pad = bundle.tower("text"), bundle.special_ids["pad"]
    tower = text_tower(context.model / "checkpoint", context.device, torch.float16)
    made: dict[str, Any] = {}  # a compiled side serves every mix
    with our_session(bundle, "text") as session:
        ours = session_side(session, manifest)
        for count in (24,) if context.dry_run else MIXES:
            lengths = log_normal_lengths(count, MEDIAN, SIGMA, LONGEST)
            rows = [[int(i) for i in random_ids(bundle, 1, length)[0]] for length in lengths]

            def call(embed: Embed, padding: bool, rows: list[list[int]] = rows) -> np.ndarray:
                return in_batches(rows, manifest, pad, embed, padding=padding)

            def side(
                name: str, make: MakeSide, call: Callable[[Embed, bool], np.ndarray] = call
            ) -> tuple[Callable[[], np.ndarray], Any]:
                if name not in made:
                    made[name] = make()
                return partial(call, made[name], "unpadded" not in name), made[name]

            sides = (
                (name, partial(side, name, make)) for name, make in text_sides(tower, context.device, dynamic=True)
            )
            work = {"texts": count, "tokens": sum(lengths), "flops": flops_of_texts(manifest, lengths)}
            share = 0.6 if count == MIXES[0] else 1.0
            _compare(context, f"mix of {count}", partial(call, ours, True), sides, work, share=share)


def warm_image(context: Context) -> None:
    """Compile for the shapes that are measured; torch keeps the kernels on disk."""
    _, tower = empty_towers(_topology(context), context.device, torch.float16)
    preprocessing = ImagePreprocessing(
        size=tower.config.image_size, resize_mode="shortest", fill_color=0,
        mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28),
    )  # fmt: skip
    size = tower.config.image_size
    for rows in (4 if context.dry_run else 32, 1):
        pixels = np.zeros((rows, size, size, 3), np.uint8)
        sides = dict(image_sides(tower, preprocessing, context.device, rows))
        _warm(context, f"image {rows}", sides["torch-fp16-compiled"], pixels)
        torch.compiler.reset()


def warm_text(context: Context) -> None:
    tower, _ = empty_towers(_topology(context), context.device, torch.float16)
    for dynamic in (False, True):
        ids = np.full((1 if not dynamic else 24, TOKENS), 7, np.int64)
        if dynamic:
            ids[1:, 20:] = tower.config.pad_token_id
        for name, make in text_sides(tower, context.device, dynamic=dynamic):
            if name.endswith("compiled"):
                _warm(context, f"text {name}{' of any shape' if dynamic else ''}", make, ids)
        torch.compiler.reset()


def autotune(context: Context) -> None:
    """Images in a batch of 32 with `max-autotune`, which tries kernels for every product."""
    bundle = Bundle(context.bundle)
    tower = image_tower(context.model / "checkpoint", context.device, torch.float16)
    pixels, work = _image_work(context, bundle, 2 if context.dry_run else 32)
    mode = "max-autotune-no-cudagraphs"
    named = dict(image_sides(tower, bundle.preprocessing, context.device, len(pixels), mode=mode))
    with our_session(bundle, "image") as session:
        ours = session_side(session, bundle.tower("image"))
        sides = [
            (f"{name}{suffix}", _on(named[name], pixels))
            for name, suffix in (("torch-fp16", ""), ("torch-fp16-compiled", f" {mode}"))
        ]
        _compare(context, f"image {len(pixels)}", partial(ours, pixels), sides, work)


def _images(context: Context, rows: int) -> None:
    bundle = Bundle(context.bundle)
    tower = image_tower(context.model / "checkpoint", context.device, torch.float16)
    pixels, work = _image_work(context, bundle, rows)
    with our_session(bundle, "image") as session:
        ours = session_side(session, bundle.tower("image"))
        sides = (
            (name, _on(make, pixels)) for name, make in image_sides(tower, bundle.preprocessing, context.device, rows)
        )
        _compare(context, f"image {rows}", partial(ours, pixels), sides, work)


def _image_work(context: Context, bundle: Bundle, rows: int) -> tuple[np.ndarray, dict[str, int]]:
    size = bundle.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)
    config = Checkpoint(context.model / "checkpoint").config.image
    return pixels, {"images": rows, "flops": flops_of_images(bundle.tower("image"), rows, config)}


def _compare(
    context: Context, case: str, ours: Callable[[], np.ndarray],
    sides: Iterable[tuple[str, Callable[[], tuple[Callable[[], np.ndarray], Any]]]], work: Mapping[str, int],
    *, share: float = 1.0,
) -> None:  # fmt: skip
    """Measure ours and each side that can be made, in turn.

    Args:
        sides: name, and what makes its call and the embedder under it.
        share: of the time that is left.
    """
    end = context.end - (1 - share) * context.left()
    start = time.monotonic()
    expected = ours()
    for _ in range(4):  # the first run, the captured one, replays
        ours()
    context.record(f"{case}: {OURS} ready", seconds=round(time.monotonic() - start, 2))
    calls: dict[str, Callable[[], np.ndarray]] = {OURS: ours}
    device: dict[str, Callable[[], float]] = {}
    rate = product_rate(context.device)
    pending = list(sides)
    for number, (name, make) in enumerate(pending):
        start = time.monotonic()
        try:
            call, embed = make()
            found = call()
            for _ in range(3):
                call()
        except Exception as error:  # the other sides can be measured all the same
            context.record(f"{case}: {name} ready", error=f"{type(error).__name__}: {error}"[:500])
            continue
        seconds = round(time.monotonic() - start, 2)
        context.record(f"{case}: {name} ready", seconds=seconds, cosine=float(cosines(found, expected).min()))
        calls[name] = call
        if context.device != "cpu" and hasattr(embed, "take_device_seconds"):
            device[name] = embed.take_device_seconds
        if number == 0 or "compiled" in name or number == len(pending) - 1:
            last = number == len(pending) - 1
            left = max(0.5, end - time.monotonic() - 3)
            _measure(context, case, calls, device, rate, work, min(left, 6.0 if last else 1.5))


def _measure(
    context: Context, case: str, calls: Mapping[str, Callable[[], np.ndarray]],
    device: Mapping[str, Callable[[], float]], rate: float | None, work: Mapping[str, int], seconds: float,
) -> None:  # fmt: skip
    times = in_turn(calls, seconds=seconds, device=device, least=3)
    rate = max(rate or 0.0, product_rate(context.device) or 0.0) or None
    for name, found in times.items():
        summary = found.summary()
        facts: dict[str, Any] = {}
        for unit in ("images", "texts", "tokens"):
            if unit in work:
                facts[f"{unit}_s"] = round(work[unit] / summary["ms"] * 1e3, 1)
        if rate is not None:
            facts["tflops"] = round(work["flops"] / summary["ms"] / 1e9, 1)
            facts["share"] = round(facts["tflops"] / rate, 4)
            facts["product_tflops"] = round(rate, 1)
        context.record(f"{case}: {name}", **summary, **facts)


def _on(make: MakeSide, values: np.ndarray) -> Callable[[], tuple[Callable[[], np.ndarray], Any]]:
    def made() -> tuple[Callable[[], np.ndarray], Any]:
        side = make()
        return partial(side, values), side

    return made


def our_session(bundle: Bundle, tower: str) -> Any:
    """Our fp16 session of a tower, closed with the block."""
    place = choose_place(bundle, [tower], backend="onnxruntime", device="cuda", precision={tower: "fp16"})
    return closing(place.open(bundle, tower, "fp16")[0])


def _warm(context: Context, name: str, make: MakeSide, values: np.ndarray) -> None:
    start = time.monotonic()
    try:
        make()(values)
        context.record(name, seconds=round(time.monotonic() - start, 1))
    except Exception as error:  # the next one may compile
        context.record(name, error=f"{type(error).__name__}: {error}"[:500])


def _topology(context: Context) -> Any:
    return context.work / "kit" / "graphs" / context.size
