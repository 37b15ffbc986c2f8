"""Staging memory of runs: several arrays share one pinned block, which is copied to and from a block of the device."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from jinaclip.backends.cuda.api import Cuda, DeviceMemory, Event, PinnedArray

_ALIGNMENT = 256  # alignment of each array in a block, in bytes
_LEAST = 4 << 20  # minimum size of a block of the device, in bytes


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

    def views(self, block: np.ndarray) -> dict[str, np.ndarray]:
        """Views of the arrays that are copied, by name.

        Args:
            block: the memory, uint8 with at least `copied` elements.
        """
        return {
            name: block[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (offset, shape, dtype) in self.parts.items()
            if offset < self.copied
        }


class Block:
    """Memory of the device that is replaced by a larger piece on demand."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.memory: DeviceMemory | None = None

    @property
    def size(self) -> int:
        return 0 if self.memory is None else self.memory.size

    @property
    def reserved(self) -> DeviceMemory:
        """The memory that `reserve` allocated."""
        assert self.memory is not None
        return self.memory

    def reserve(self, size: int) -> None:
        """Make sure that the block has at least `size` bytes. Sizes are rounded up to powers of two, so that
        replacements are rare. No run may be using the current memory.
        """
        if self.size < size:
            self.close()
            self.memory = DeviceMemory(self._cuda, max(_LEAST, 1 << (size - 1).bit_length()))

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class Slot:
    """Pinned memory for one run at a time, and the event that marks the run's end in the stream.

    Attributes:
        input, output: the pinned memory.
        done: the event.
        in_flight: whether copies from or to the memory may still be in the stream.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.input, self.output = _NOTHING, _NOTHING
        self.done = Event(cuda)
        self.in_flight = False

    def reserve(self, inputs: int, outputs: int) -> None:
        """Make sure that the memory has at least this many bytes for inputs and outputs. No run may be using it."""
        if self.input.size < inputs:
            old, self.input = self.input, _NOTHING
            old.close()
            self.input = PinnedArray(self._cuda, inputs)
        if self.output.size < outputs:
            old, self.output = self.output, _NOTHING
            old.close()
            self.output = PinnedArray(self._cuda, outputs)

    def close(self) -> None:
        self.input.close()
        self.output.close()
        self.done.close()


class _NoMemory:
    """Placeholder for memory that is not allocated yet."""

    size = 0
    array = np.empty(0, np.uint8)

    def close(self) -> None:
        pass


_NOTHING: Any = _NoMemory()
