"""What jinaclip is compared with on a GPU: torch on the checkpoint's towers, in each way that it is used there.

Images in fp16 and bf16: eager, with flash attention alone, and compiled. Texts in fp16: padded, and without padding. A
single row is also captured as a CUDA graph. "torch's best" of a case is the fastest of them in that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jinaclip.bundle import Bundle
from jinaclip_bench.errors import BenchError
from jinaclip_bench.measure import CAPTURED, COMPILED, UNPADDED
from jinaclip_bench.settings import Embed
from jinaclip_bench.torch_towers import ImagesOfPixels, TextsOfIds, TextsWithoutPadding, without_padding
from jinaclip_export.checkpoint import Checkpoint

DTYPES = {"torch-fp16": torch.float16, "torch-bf16": torch.bfloat16}
MATMUL_SIZE = 8192

Forward = Callable[..., Tensor]


def require_torch_cuda(index: int) -> None:
    """Raises BenchError: torch is not one for CUDA, does not see the device, or has no flash attention for it."""
    if not torch.cuda.is_available():
        found = "was built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} sees no GPU"
        raise BenchError(
            f"torch {torch.__version__} {found}, so there is nothing to compare with on a GPU; install a build for "
            "this driver's CUDA"
        )
    if index >= torch.cuda.device_count():
        raise BenchError(f"torch sees {torch.cuda.device_count()} GPUs, no cuda:{index}; see CUDA_VISIBLE_DEVICES")
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise BenchError(
            f"cuda:{index} has capability {major}.{minor}; torch's flash attention, which is measured, needs 8.0"
        )


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work here, in words; None if it does. It needs triton and a C compiler."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        return str(error).strip().splitlines()[0][:200]
    return None


@contextmanager
def open_torch_cuda(
    checkpoint: Checkpoint, bundle: Bundle, tower: str, index: int, *, tell: Callable[[str], None]
) -> Iterator[dict[str, Embed]]:
    """One tower on a GPU as every side, freed at the end.

    Args:
        index: of the device.
        tell: called with a sentence where torch.compile does not work and its sides are left out.
    """
    device = torch.device("cuda", index)
    problem = compile_problem(device)
    if problem is not None:
        tell(f"torch.compile does not work here, its sides are left out: {problem}")
    load = _text if tower == "text" else _image
    with torch.cuda.device(device):
        embedders: dict[str, Embed] = dict(load(checkpoint, bundle, device, compiles=problem is None))
        try:
            yield embedders
        finally:
            embedders.clear()
            torch.compiler.reset()
            torch.cuda.empty_cache()


class CudaEmbed:
    """A side: arrays of the host to arrays of the host, and the device's time for the tower between them.

    Args:
        place: arrays to what `forward` takes, on the device.
        forward: the tower.
    """

    def __init__(self, place: Callable[[np.ndarray], tuple[Any, ...]], forward: Forward) -> None:
        self._place, self._forward = place, forward
        self._begin, self._end = _events(2)
        self._seconds = 0.0

    @torch.inference_mode()
    def __call__(self, values: np.ndarray) -> np.ndarray:
        arguments = self._place(values)
        self._begin.record()
        raw = self._forward(*arguments)
        self._end.record()
        vectors: np.ndarray = F.normalize(raw, dim=-1).cpu().numpy()
        self._seconds += self._begin.elapsed_time(self._end) / 1e3
        return vectors

    def take_device_seconds(self) -> float:
        """Of all calls since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Captured:
    """A tower as CUDA graphs, one for each shape that comes: its launches cost one.

    Args:
        forward: takes one tensor, and values that decide what runs.
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
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):  # kernels are compiled and chosen, which may not be captured
                self._forward(source, *others)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self._forward(source, *others)
        return graph, source, result


def matmul_tflops(index: int) -> float:
    """What this GPU reaches now in float16, TFLOP/s: the median of ten products of random 8192 × 8192 matrices."""
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
    """ids [B, T] without their padding, as TextsWithoutPadding takes them: ids, positions, rows, offsets, longest."""
    rows, positions = np.nonzero(ids != pad)
    lengths = np.bincount(rows, minlength=len(ids))
    offsets = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
    return ids[rows, positions], positions, rows, offsets, int(lengths.max())


def _image(
    checkpoint: Checkpoint, bundle: Bundle, device: torch.device, *, compiles: bool
) -> Iterator[tuple[str, Embed]]:
    mean, std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (bundle.preprocessing.mean, bundle.preprocessing.std)
    )

    def place(pixels: np.ndarray) -> tuple[Any, ...]:
        return (_upload(pixels, device),)

    for name, dtype in DTYPES.items():
        forward = ImagesOfPixels(checkpoint.image_tower().to(device, dtype), mean, std)
        yield name, CudaEmbed(place, forward)
        yield f"{name}-flash", CudaEmbed(place, _flash_alone(forward))
        if compiles:
            compiled = torch.compile(forward, dynamic=False, fullgraph=True)
            yield f"{name}{COMPILED}", CudaEmbed(place, compiled)
            yield f"{name}{CAPTURED}", CudaEmbed(place, Captured(compiled))


def _text(
    checkpoint: Checkpoint, bundle: Bundle, device: torch.device, *, compiles: bool
) -> Iterator[tuple[str, Embed]]:
    pad = bundle.special_ids["pad"]

    def place(ids: np.ndarray) -> tuple[Any, ...]:
        return _upload(ids, device), bool((ids == pad).any())

    def place_unpadded(ids: np.ndarray) -> tuple[Any, ...]:
        *arrays, longest = unpadded(ids, pad)
        return (*(_upload(array, device) for array in arrays), longest)

    tower = checkpoint.text_tower().to(device, torch.float16)
    forward = TextsOfIds(tower)
    yield "torch-fp16", CudaEmbed(place, forward)
    yield UNPADDED, CudaEmbed(place_unpadded, _flash_alone(TextsWithoutPadding(tower, without_padding())))
    if compiles:
        compiled = torch.compile(forward, dynamic=False, fullgraph=True)
        yield f"torch-fp16{CAPTURED}", CudaEmbed(place, Captured(compiled))


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]


def _flash_alone(forward: Forward) -> Forward:
    def flash(*arguments: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return forward(*arguments)

    return flash


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Through pinned memory, as the quickest of ours does."""
    source = torch.from_numpy(array)
    pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return pinned.copy_(source).to(device, non_blocking=True)
