"""Torch's sides on a GPU: the checkpoint's towers (jinaclip_bench.sides.torch_forwards).

A single row is also captured as a CUDA graph. "torch's best" of a case is the fastest of torch's sides in the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.cases.settings import Embed
from jinaclip_bench.errors import BenchError, NotCompiled
from jinaclip_bench.measuring.timing import CAPTURED, UNPADDED
from jinaclip_bench.sides.torch_forwards import Forward, image_forwards, text_forwards
from jinaclip_bench.sides.torch_towers import ImagesOfPixels, mean_and_std, without_padding
from jinaclip_export.checkpoint.reader import Checkpoint

logger = logging.getLogger("jinaclip")
MATMUL_SIZE = 8192


def require_torch_cuda(index: int) -> None:
    """Check that torch can be measured on the device.

    Raises:
        BenchError: torch was built without CUDA, does not see the device, or has no flash attention for it.
    """
    if not torch.cuda.is_available():
        found = "was built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} sees no GPU"
        raise BenchError(
            f"torch {torch.__version__} {found}, so torch cannot be measured on a GPU; install a build for this "
            "driver's CUDA"
        )
    if index >= torch.cuda.device_count():
        raise BenchError(f"torch sees {torch.cuda.device_count()} GPUs, no cuda:{index}; see CUDA_VISIBLE_DEVICES")
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise BenchError(f"cuda:{index} has capability {major}.{minor}; torch's flash attention needs 8.0 or higher")


def compile_problem(device: torch.device) -> str | None:
    """Reason why torch.compile does not work on this machine, or None. It needs triton and a C compiler."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


@contextmanager
def open_torch_cuda(
    checkpoint: Checkpoint, bundle: Bundle, tower: str, index: int, *, max_autotune: bool = False
) -> Iterator[dict[str, Embed]]:
    """Open all of torch's sides of one tower on a GPU. They are freed at the end.

    If torch.compile does not work, its sides are skipped and a message is logged.

    Args:
        checkpoint: the checkpoint.
        bundle: the bundle made from it.
        tower: "text" or "image".
        index: index of the device.
        max_autotune: for images, whether to add the side compiled with max-autotune.
    """
    device = torch.device("cuda", index)
    problem = compile_problem(device)
    if problem is not None:
        logger.warning("torch.compile does not work on this machine, so its sides are skipped: %s", problem)
    with torch.cuda.device(device):
        if tower == "text":
            embedders = _text(checkpoint, bundle, device, compiles=problem is None)
        else:
            embedders = _image(checkpoint, bundle, device, compiles=problem is None, max_autotune=max_autotune)
        try:
            yield embedders
        finally:
            embedders.clear()
            torch.compiler.reset()
            torch.cuda.empty_cache()


class CudaEmbed:
    """A side from host arrays to host arrays, which also measures the device's time for the tower.

    Args:
        name: name of the side.
        to_device: function that copies an array to the device, as the arguments of `forward`.
        forward: the tower.
    """

    def __init__(self, name: str, to_device: Callable[[np.ndarray], tuple[Any, ...]], forward: Forward) -> None:
        self._name, self._to_device, self._forward = name, to_device, forward
        self._begin, self._end = _events(2)
        self._seconds = 0.0

    @torch.inference_mode()
    def __call__(self, values: np.ndarray) -> np.ndarray:
        arguments = self._to_device(values)
        self._begin.record()
        try:
            raw = self._forward(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise NotCompiled(f"torch.compile cannot compile {self._name}: {_first_line(error)}") from error
        self._end.record()
        vectors: np.ndarray = F.normalize(raw, dim=-1).cpu().numpy()
        self._seconds += self._begin.elapsed_time(self._end) / 1e3
        return vectors

    def take_device_seconds(self) -> float:
        """The device's time of all calls since the last call of this method, in seconds."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Captured:
    """A tower captured as CUDA graphs, one for each input shape, so that a run needs a single launch.

    Args:
        forward: function of one tensor, and of values that determine which kernels run.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, values: Tensor, *others: Any) -> Tensor:
        key = (values.shape, *others)
        if key not in self._graphs:
            self._graphs[key] = self._capture(values.clone(), *others)
        graph, source, result = self._graphs[key]
        source.copy_(values)
        graph.replay()
        return result

    def _capture(self, source: Tensor, *others: Any) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(3):  # compile and select kernels, which is not allowed during a capture
                self._forward(source, *others)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self._forward(source, *others)
        return graph, source, result


def matmul_tflops(index: int) -> float:
    """The GPU's current rate in float16, in TFLOP/s: the median of ten products of random 8192 × 8192 matrices."""
    size, device = MATMUL_SIZE, torch.device("cuda", index)
    with torch.cuda.device(device), torch.inference_mode():
        a, b = (torch.randn(size, size, dtype=torch.float16, device=device) for _ in range(2))
        events = _events(11)
        for _ in range(5):
            a @ b
        for event in events[:-1]:
            event.record()
            a @ b
        events[-1].record()
        torch.cuda.synchronize()
        milliseconds = [one.elapsed_time(other) for one, other in pairwise(events)]
    return 2 * size**3 / float(np.median(milliseconds)) / 1e9


def unpadded(ids: np.ndarray, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Remove padding from ids [B, T]. Returns ids, positions, rows, offsets, longest for TextsWithoutPadding."""
    rows, positions = np.nonzero(ids != pad)
    lengths = np.bincount(rows, minlength=len(ids))
    offsets = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
    return ids[rows, positions], positions, rows, offsets, int(lengths.max())


def _image(
    checkpoint: Checkpoint, bundle: Bundle, device: torch.device, *, compiles: bool, max_autotune: bool
) -> dict[str, Embed]:
    def to_device(pixels: np.ndarray) -> tuple[Any, ...]:
        return (_upload(pixels, device),)

    tower = checkpoint.image_tower().to(device, torch.float16)
    images = ImagesOfPixels(tower, *mean_and_std(bundle, device))
    forwards = image_forwards(images, compiles=compiles, max_autotune=max_autotune)
    return {name: _embed(name, to_device, forward) for name, forward in forwards.items()}


def _text(checkpoint: Checkpoint, bundle: Bundle, device: torch.device, *, compiles: bool) -> dict[str, Embed]:
    pad = bundle.special_ids["pad"]

    def to_device(ids: np.ndarray) -> tuple[Any, ...]:
        return _upload(ids, device), bool((ids == pad).any())

    def unpadded_to_device(ids: np.ndarray) -> tuple[Any, ...]:
        *arrays, longest = unpadded(ids, pad)
        return (*(_upload(array, device) for array in arrays), longest)

    tower = checkpoint.text_tower().to(device, torch.float16)
    forwards = text_forwards(tower, without_padding(), compiles=compiles)
    copies = {name: unpadded_to_device if name.startswith(UNPADDED) else to_device for name in forwards}
    return {name: _embed(name, copies[name], forward) for name, forward in forwards.items()}


def _embed(name: str, to_device: Callable[[np.ndarray], tuple[Any, ...]], forward: Forward) -> CudaEmbed:
    return CudaEmbed(name, to_device, Captured(forward) if name.endswith(CAPTURED) else forward)


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device through pinned memory, as jinaclip's fastest backend does."""
    source = torch.from_numpy(array)
    pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return pinned.copy_(source).to(device, non_blocking=True)
