"""Parts "fast-…" and "warm-…": our sessions against torch, in turn; and torch's compiler run before, for its cache.

A side is measured as soon as it is ready, and all of them again when the next one is: a part that is stopped has
recorded the sides that were ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jinaclip.backends.cost import GPU_COST
from jinaclip.bundle.manifest import Bundle, TowerManifest
from jinaclip.preprocessing.image import ImagePreprocessing
from jinaclip_bench.cases.inputs import log_normal_lengths
from jinaclip_bench.cases.table import random_ids
from jinaclip_bench.scenarios.flops import flops_of_images, flops_of_texts
from jinaclip_export.checkpoint.reader import Checkpoint
from tests.gpu.proof.context import Context
from tests.gpu.proof.ours import OurSide, open_all
from tests.gpu.proof.sides import Call, Side, TorchSide, image_sides, in_batches, text_sides
from tests.gpu.proof.timing import cosines, in_turn, product_rate
from tests.gpu.proof.towers import empty_towers, image_tower, text_tower

TOKENS = 32
MIXES = (512, 1024)  # texts
MEDIAN, SIGMA, LONGEST = 30, 0.8, 512
BATCHES = 4  # of images
# A call, and the embedder under it, once they are made.
Make = Callable[[], tuple[Call, Any]]


def image_32(context: Context) -> None:
    _images(context, 4 if context.dry_run else 32)


def image_1(context: Context) -> None:
    _images(context, 1)


def text_1(context: Context) -> None:
    bundle = Bundle(context.bundle)
    ids = random_ids(bundle, 1, TOKENS)
    work = {"texts": 1, "tokens": ids.size, "flops": flops_of_texts(bundle.tower("text"), [TOKENS])}
    with ExitStack() as stack:
        mine = {name: partial(side, ids) for name, side in open_all(context, bundle, "text", stack).items()}
        tower = text_tower(context.model / "checkpoint", context.device, torch.float16)
        sides = [(name, _on(make, ids)) for name, make in text_sides(tower, context.device, dynamic=False)]
        compare(context, f"text 1 x {TOKENS}", mine, sides, work)


def mix(context: Context) -> None:
    """Texts of log-normal lengths, from their ids."""
    bundle = Bundle(context.bundle)
    manifest, pad = bundle.tower("text"), bundle.special_ids["pad"]
    made: dict[str, TorchSide] = {}  # a compiled side serves every mix

    def torch_side(name: str, make: Callable[[], TorchSide], rows: list[list[int]]) -> tuple[Call, Any]:
        if name not in made:
            made[name] = make()
        return in_mix(made[name], rows, manifest, pad, unpadded="unpadded" in name), None

    with ExitStack() as stack:
        mine = open_all(context, bundle, "text", stack)
        tower = text_tower(context.model / "checkpoint", context.device, torch.float16)
        counts = (24,) if context.dry_run else MIXES
        for number, count in enumerate(counts):
            rows = mixed_rows(count, bundle.vocab_size)
            lengths = [len(row) for row in rows]
            calls = {name: in_mix(side, rows, manifest, pad) for name, side in mine.items()}
            sides = [
                (name, partial(torch_side, name, make, rows))
                for name, make in text_sides(tower, context.device, dynamic=True)
            ]
            work = {"texts": count, "tokens": sum(lengths), "flops": flops_of_texts(manifest, lengths)}
            share = 1.0 if number == len(counts) - 1 else 0.7
            compare(context, f"mix of {count}", calls, sides, work, share=share)


def in_mix(side: Side, rows: list[list[int]], manifest: TowerManifest, pad: int, *, unpadded: bool = False) -> Call:
    """The call for a mix: ours in the runs of ClipModel, torch's in runs for padding, or in larger ones."""
    cost = side.cost if isinstance(side, OurSide) else None if unpadded else GPU_COST
    batches, places = in_batches(rows, manifest, pad, cost)
    if isinstance(side, OurSide):
        return partial(side.many, batches, places)
    order = np.argsort(np.concatenate(places))
    return lambda: side.many(batches)[order]


def mixed_rows(count: int, vocabulary: int) -> list[list[int]]:
    """Ids of texts of log-normal lengths; the same every time."""
    rng = np.random.default_rng(0)
    lengths = log_normal_lengths(count, MEDIAN, SIGMA, LONGEST)
    return [[0, *map(int, rng.integers(4, vocabulary - 1, length - 2)), 2] for length in lengths]


def warm_image(context: Context) -> None:
    """Compile for the shapes that are measured; torch keeps the kernels on disk."""
    _, tower = empty_towers(_topology(context), context.device, torch.float16)
    size = tower.config.image_size
    preprocessing = ImagePreprocessing(size=size, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    for rows in (4 if context.dry_run else 32, 1):
        pixels = np.zeros((rows, size, size, 3), np.uint8)
        sides = dict(image_sides(tower, preprocessing, context.device, rows))
        _warm(context, f"image {rows}", lambda: sides["torch-fp16-compiled"]()(pixels))  # noqa: B023
        torch.compiler.reset()


def warm_text(context: Context) -> None:
    tower, _ = empty_towers(_topology(context), context.device, torch.float16)
    config = tower.config
    manifest = TowerManifest(
        "text", "input_ids", "int64", {}, config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        config.intermediate_size,
    )  # fmt: skip
    ids = np.full((1, TOKENS), 7, np.int64)
    single = dict(text_sides(tower, context.device, dynamic=False))
    _warm(context, "text 1", lambda: single["torch-fp16-compiled"]()(ids))
    torch.compiler.reset()
    rows = mixed_rows(24 if context.dry_run else MIXES[0], config.vocab_size)
    mixed = dict(text_sides(tower, context.device, dynamic=True))
    for name in ("torch-fp16-unpadded-compiled", "torch-fp16-compiled"):
        in_runs = partial(in_mix, rows=rows, manifest=manifest, pad=config.pad_token_id, unpadded="unpadded" in name)
        _warm(context, f"mix {name}", lambda: in_runs(mixed[name]())())  # noqa: B023


def autotune(context: Context) -> None:
    """Images in a batch of 32 with `max-autotune`, which tries kernels for every product."""
    bundle = Bundle(context.bundle)
    pixels, work = _image_work(context, bundle, 2 if context.dry_run else 32)
    with ExitStack() as stack:
        mine = {name: partial(side, pixels) for name, side in open_all(context, bundle, "image", stack).items()}
        tower = image_tower(context.model / "checkpoint", context.device, torch.float16)
        made = image_sides(tower, bundle.preprocessing, context.device, len(pixels), max_autotune=True)
        sides = [(name.replace("compiled", "max-autotune"), _on(make, pixels)) for name, make in made]
        compare(context, f"image {len(pixels)}", mine, sides, work)


def _images(context: Context, rows: int) -> None:
    """One image by itself; a large batch several times, one behind the other, as bulk encoding asks for it."""
    bundle = Bundle(context.bundle)
    pixels, work = _image_work(context, bundle, rows)
    times = 1 if rows == 1 else BATCHES
    work = {unit: times * value for unit, value in work.items()}

    def call(side: Side) -> Call:
        return partial(side, pixels) if times == 1 else partial(side.many, [pixels] * times)

    def made(make: Callable[[], TorchSide]) -> tuple[Call, Any]:
        side = make()
        return call(side), side if times == 1 else None

    with ExitStack() as stack:
        mine = {name: call(side) for name, side in open_all(context, bundle, "image", stack).items()}
        tower = image_tower(context.model / "checkpoint", context.device, torch.float16)
        sides = image_sides(tower, bundle.preprocessing, context.device, rows)
        case = f"image {rows}" if times == 1 else f"{times} x image {rows}"
        compare(context, case, mine, [(name, partial(made, make)) for name, make in sides], work)


def _image_work(context: Context, bundle: Bundle, rows: int) -> tuple[np.ndarray, dict[str, int]]:
    size = bundle.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)
    config = Checkpoint(context.model / "checkpoint").config.image
    return pixels, {"images": rows, "flops": flops_of_images(bundle.tower("image"), rows, config)}


def compare(
    context: Context, case: str, mine: Mapping[str, Call], sides: Iterable[tuple[str, Make]], work: Mapping[str, int],
    *, share: float = 1.0,
) -> None:  # fmt: skip
    """Measure ours and each side that can be made, in turn.

    Args:
        mine: our calls by name.
        sides: name, and what makes its call.
        work: "images", "texts", "tokens" and "flops" of a call.
        share: of the time that is left.
    """
    end = context.end - (1 - share) * context.left() - 2.0
    calls: dict[str, Call] = {}
    device: dict[str, Callable[[], float]] = {}
    expected: np.ndarray | None = None
    rate = product_rate(context.device)
    pending: list[tuple[str, Make]] = [*((name, partial(_itself, call)) for name, call in mine.items()), *sides]
    for number, (name, make) in enumerate(pending):
        start = time.monotonic()
        try:
            call, embed = make()
            found = call()
            for _ in range(4):  # ours: the first run, the second, replays
                call()
                time.sleep(0.02)  # in which ours are captured
        except Exception as error:  # the other sides can be measured all the same
            context.record(f"{case}: {name} ready", error=f"{type(error).__name__}: {error}"[:500])
            continue
        seconds = round(time.monotonic() - start, 2)
        expected = found if expected is None else expected
        context.record(f"{case}: {name} ready", seconds=seconds, cosine=float(cosines(found, expected).min()))
        calls[name] = call
        if context.device != "cpu" and isinstance(embed, TorchSide):
            device[name] = embed.take_device_seconds
        last = number == len(pending) - 1
        if last or number >= len(mine):
            left = max(0.5, end - time.monotonic())
            _measure(context, case, calls, device, rate, work, min(left, 6.0 if last else 1.5))


def _measure(
    context: Context, case: str, calls: Mapping[str, Call], device: Mapping[str, Callable[[], float]],
    rate: float | None, work: Mapping[str, int], seconds: float,
) -> None:  # fmt: skip
    times = in_turn(calls, seconds=seconds, device=device, least=3)
    rate = max(rate or 0.0, product_rate(context.device) or 0.0) or None
    for name, found in times.items():
        summary = found.summary()
        context.record(f"{case}: {name}", **summary, **rates(summary["ms"], work, rate))


def rates(milliseconds: float, work: Mapping[str, int], rate: float | None) -> dict[str, float]:
    """Items per second; and with the rate of a large product, TFLOP/s and the share of that rate."""
    facts = {
        f"{unit}_s": round(work[unit] / milliseconds * 1e3, 1) for unit in ("images", "texts", "tokens") if unit in work
    }
    if rate is not None:
        tflops = work["flops"] / milliseconds / 1e9
        facts |= {"tflops": round(tflops, 1), "share": round(tflops / rate, 4), "product_tflops": round(rate, 1)}
    return facts


def _itself(call: Call) -> tuple[Call, Any]:
    return call, None


def _on(make: Callable[[], TorchSide], values: np.ndarray) -> Make:
    def made() -> tuple[Call, Any]:
        side = make()
        return partial(side, values), side

    return made


def _warm(context: Context, name: str, call: Call) -> None:
    start = time.monotonic()
    try:
        call()
        context.record(name, seconds=round(time.monotonic() - start, 1))
    except Exception as error:  # the next one may compile
        context.record(name, error=f"{type(error).__name__}: {error}"[:500])


def _topology(context: Context) -> Path:
    return context.work / "kit" / "graphs" / context.size
