"""Memory on both sides of a run: arrays in one pinned block, copied to and from blocks of the device."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from jinaclip.backends.cuda.api import Cuda, DeviceMemory, Event, PinnedArray

_ALIGNMENT = 256  # bytes, of every array in a block
_LEAST = 4 << 20  # bytes of a block of the device


class Layout:
    """Arrays in one block of memory, so that one copy moves them all.

    Args:
        arrays: shape and dtype of each.
        unset: the one whose contents do not matter; it comes last and is not copied.

    Attributes:
        parts: of each, its offset in bytes, shape and dtype.
        copied: bytes of the arrays that are copied.
        size: bytes of the block.
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
        """The arrays that are copied, in a block uint8 [copied or more]."""
        return {
            name: block[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (offset, shape, dtype) in self.parts.items()
            if offset < self.copied
        }


class Block:
    """Memory of the device that is replaced by a larger piece when more is asked for."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.memory: DeviceMemory | None = None

    @property
    def size(self) -> int:
        return 0 if self.memory is None else self.memory.size

    @property
    def reserved(self) -> DeviceMemory:
        """What `reserve` made."""
        assert self.memory is not None
        return self.memory

    def reserve(self, size: int) -> None:
        """At least so many bytes, and so many more that it is seldom asked for. Nothing may be running on the memory
        that is there.
        """
        if self.size < size:
            self.close()
            self.memory = DeviceMemory(self._cuda, max(_LEAST, 1 << (size - 1).bit_length()))

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class Slot:
    """Pinned memory of one run, and the mark of its end in the stream.

    Attributes:
        in_flight: whether copies from or to it may still be in the stream.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.input, self.output = _NOTHING, _NOTHING
        self.done = Event(cuda)
        self.in_flight = False

    def reserve(self, inputs: int, outputs: int) -> None:
        """Memory for at least so many bytes. Nothing may be running on the slot."""
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
    """Stands for memory that was not asked for yet."""

    size = 0
    array = np.empty(0, np.uint8)

    def close(self) -> None:
        pass


_NOTHING: Any = _NoMemory()
