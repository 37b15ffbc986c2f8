"""Staging memory of runs: several arrays share one pinned block, which is copied to and from a block of the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, Generic, TypeVar

import numpy as np

from jinaclip.backends.cuda.api import Cuda, DeviceMemory, Event, PinnedArray

_ALIGNMENT = 256  # alignment of each array in a block, in bytes
_LEAST = 4 << 20  # minimum size of a block of the device, in bytes
M = TypeVar("M", bound=DeviceMemory | PinnedArray)


class Layout:
    """The layout of several arrays in one block of memory, which one operation copies.

    Args:
        arrays: shape and dtype of each array, by name.
        unset: name of an array whose contents do not matter. It is placed last and not copied.

    Attributes:
        parts: offset in bytes, shape and dtype of each array, by name.
        copied: number of bytes that are copied.
        size: size of the block, in bytes.
    """

    def __init__(self, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], unset: str | None = None) -> None:
        self.parts: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        self.size = self.copied = 0
        for name in sorted(arrays, key=lambda name: name == unset):
            shape, dtype = arrays[name]
            self.parts[name] = (self.size, shape, dtype)
            self.size += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            if name != unset:
                self.copied = self.size

    def views(self, block: PinnedArray) -> dict[str, np.ndarray]:
        """Views of the arrays that are copied, by name. The block has at least `copied` bytes."""
        copied = {name: part for name, part in self.parts.items() if part[0] < self.copied}
        return {name: block.view(shape, dtype, offset) for name, (offset, shape, dtype) in copied.items()}


class Block(Generic[M]):
    """Memory that is replaced by a larger piece on demand.

    Args:
        allocate: allocates at least as many bytes as it is given.
    """

    def __init__(self, allocate: Callable[[int], M]) -> None:
        self._allocate = allocate
        self._memory: M | None = None

    @classmethod
    def on_device(cls, cuda: Cuda) -> Block[DeviceMemory]:
        """A block of device memory. Sizes are rounded up to powers of two, so that replacements are rare."""
        return Block(lambda size: DeviceMemory(cuda, max(_LEAST, 1 << (size - 1).bit_length())))

    @property
    def size(self) -> int:
        return 0 if self._memory is None else self._memory.size

    @property
    def memory(self) -> M:
        """The memory that `reserve` allocated."""
        assert self._memory is not None
        return self._memory

    def reserve(self, size: int) -> None:
        """Make sure that the block has at least `size` bytes. No run may be using the current memory."""
        if self.size < size:
            self.close()
            self._memory = self._allocate(size)

    def close(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()


class Slot:
    """Pinned memory for one run at a time, and the event that marks the run's end in the stream.

    Attributes:
        input, output: the pinned memory.
        done: the event.
        in_flight: whether copies from or to the memory may still be in the stream.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.input, self.output = (Block(partial(PinnedArray, cuda)) for _ in range(2))
        self.done = Event(cuda)
        self.in_flight = False

    def close(self) -> None:
        for resource in (self.input, self.output, self.done):
            resource.close()
