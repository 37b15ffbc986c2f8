"""What is measured against each other: calls that take ids or pixels of the host and return unit vectors to it.

Torch runs the exporter's towers in float16, written as one writes them for a GPU (bench/sides/torch_towers.py): eager
and compiled; texts padded and without padding; a single row also as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jinaclip.backends.cost import RunCost
from jinaclip.bundle.manifest import TowerManifest
from jinaclip.packing import pack_texts
from jinaclip.preprocessing.image import ImagePreprocessing
from jinaclip_bench.sides.torch_cuda import Captured, unpadded
from jinaclip_bench.sides.torch_forwards import compiled
from jinaclip_bench.sides.torch_towers import (
    ImagesOfPixels,
    TextsOfIds,
    TextsWithoutPadding,
    jagged_attention,
    varlen_attention,
)
from jinaclip_export.towers.image import ImageTower
from jinaclip_export.towers.text import TextTower

Call = Callable[[], np.ndarray]
UNPADDED_TOKENS = 32768  # of a run without padding


class TorchSide:
    """A tower of torch: arrays of the host to unit vectors of the host.

    Args:
        place: arrays to what `forward` takes, on the device.
        forward: the tower.
        device: of torch.
    """

    def __init__(
        self, place: Callable[[np.ndarray], tuple[Any, ...]], forward: Callable[..., Tensor], device: str
    ) -> None:
        self._place, self._forward = place, forward
        cuda = device != "cpu"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []  # type: ignore[no-untyped-call]
        self._seconds = 0.0

    @torch.inference_mode()
    def __call__(self, values: np.ndarray) -> np.ndarray:
        arguments = self._place(values)
        for event in self._events[:1]:
            event.record()
        raw = self._forward(*arguments)
        for event in self._events[1:]:
            event.record()
        vectors: np.ndarray = F.normalize(raw, dim=-1).cpu().numpy()
        if self._events:
            self._seconds += self._events[0].elapsed_time(self._events[1]) / 1e3
        return vectors

    @torch.inference_mode()
    def many(self, batches: Sequence[np.ndarray]) -> np.ndarray:
        """Vectors of several batches; the host waits once, at the end."""
        found = [self._forward(*self._place(values)) for values in batches]
        vectors: np.ndarray = F.normalize(torch.cat(found), dim=-1).cpu().numpy()
        return vectors

    def take_device_seconds(self) -> float:
        """Of all calls since this was asked last; launches that the device waits for are in it."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def image_sides(
    tower: ImageTower, preprocessing: ImagePreprocessing, device: str, rows: int, *, max_autotune: bool = False
) -> Iterator[tuple[str, Callable[[], TorchSide]]]:
    """Sides that take uint8 [rows, S, S, 3]: name, and what makes it. Those that compile come last.

    Args:
        max_autotune: compile with it (torch_forwards.compiled).
    """
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    forward = ImagesOfPixels(tower, mean, std)

    def place(pixels: np.ndarray) -> tuple[Any, ...]:
        return (upload(pixels, device),)

    yield "torch-fp16", lambda: TorchSide(place, forward, device)
    if rows == 1 and device != "cpu":
        yield "torch-fp16-graph", lambda: TorchSide(place, Captured(forward), device)
    compiled_forward = compiled(forward, dynamic=False, max_autotune=max_autotune)
    yield "torch-fp16-compiled", lambda: TorchSide(place, compiled_forward, device)
    if rows == 1 and device != "cpu":
        yield "torch-fp16-compiled-graph", lambda: TorchSide(place, Captured(compiled_forward), device)


def text_sides(tower: TextTower, device: str, *, dynamic: bool) -> Iterator[tuple[str, Callable[[], TorchSide]]]:
    """Sides that take int64 [B, T]: name, and what makes it. Those that compile come last.

    Args:
        dynamic: shapes differ from call to call, and rows are padded.
    """
    pad = tower.config.pad_token_id
    forward = TextsOfIds(tower)
    bare = TextsWithoutPadding(tower, jagged_attention if device == "cpu" else varlen_attention)

    def place(ids: np.ndarray) -> tuple[Any, ...]:
        return upload(ids, device), bool((ids == pad).any())

    def place_unpadded(ids: np.ndarray) -> tuple[Any, ...]:
        *arrays, longest = unpadded(ids, pad)
        return (*(upload(array, device) for array in arrays), longest)

    yield "torch-fp16", lambda: TorchSide(place, forward, device)
    if dynamic:
        yield "torch-fp16-unpadded", lambda: TorchSide(place_unpadded, bare, device)
    elif device != "cpu":
        yield "torch-fp16-graph", lambda: TorchSide(place, Captured(forward), device)
    compiled_forward = compiled(forward, dynamic=dynamic)
    if dynamic:  # torch's best comes first: there may be no time for the other
        yield "torch-fp16-unpadded-compiled", lambda: TorchSide(place_unpadded, compiled(bare, dynamic=True), device)
    yield "torch-fp16-compiled", lambda: TorchSide(place, compiled_forward, device)
    if not dynamic and device != "cpu":
        yield "torch-fp16-compiled-graph", lambda: TorchSide(place, Captured(compiled_forward), device)


class Side(Protocol):
    """What is measured: one batch to unit vectors, or several."""

    def __call__(self, values: np.ndarray) -> np.ndarray: ...

    def many(self, batches: Sequence[np.ndarray]) -> np.ndarray: ...


def in_batches(
    rows: Sequence[Sequence[int]], tower: TowerManifest, pad: int, cost: RunCost | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Texts in runs, each int64 [B, T]; and of each run, which texts are in it.

    Args:
        rows: ids of each text.
        cost: of a run, which decides what runs together; None fills runs without padding up to UNPADDED_TOKENS.
    """
    lengths = [len(row) for row in rows]
    batches = _filled(lengths) if cost is None else pack_texts(lengths, tower, cost=cost)
    arrays = []
    for batch in batches:
        ids = np.full((len(batch), max(lengths[i] for i in batch)), pad, np.int64)
        for number, index in enumerate(batch):
            ids[number, : lengths[index]] = rows[index]
        arrays.append(ids)
    return arrays, [np.array(batch) for batch in batches]


def _filled(lengths: Sequence[int]) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    tokens = 0
    for index, length in enumerate(lengths):
        if tokens + length > UNPADDED_TOKENS and batches[-1]:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += length
    return batches


def upload(array: np.ndarray, device: str) -> Tensor:
    """To torch's device, through pinned memory."""
    source = torch.from_numpy(np.ascontiguousarray(array))
    if device == "cpu":
        return source
    pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return pinned.copy_(source).to(device, non_blocking=True)
