"""Device code in a shared library: what is not for one architecture is zeroed, so that the library compresses.

nvcc stores device code in containers: a header, then an entry for each architecture, a cubin compressed with zstd. The
driver chooses an entry by its header, and reads no other's content. CUDA loads a container when one of its kernels is
launched first, so one whose kernels are never launched is not missed.
"""

from __future__ import annotations

import mmap
import re
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
_PTX, _CUBIN = 1, 2
_COMPRESSED = 0x8000  # flag of an entry: zstd
_FUNCTION, _SYMBOLS, _IS_KERNEL = 2, 2, 0x10  # ELF: type of a symbol and of a section; bit of a symbol's st_other


@dataclass(frozen=True)
class Entry:
    """Device code of a container for one architecture.

    Attributes:
        kind: 1 for PTX, 2 for a cubin.
        capability: 90 for compute capability 9.0.
        start, size: of its content in the file, padding included.
        stored: bytes of the content without padding.
        compressed: with zstd.
    """

    kind: int
    capability: int
    start: int
    size: int
    stored: int
    compressed: bool


def containers(data: mmap.mmap) -> Iterator[list[Entry]]:
    """The entries of every container, in the order of the file."""
    at = data.find(MAGIC)
    while at >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data, at)
        end = at + header + size
        if version != 1 or header != 16 or end > len(data):
            at = data.find(MAGIC, at + len(MAGIC))
            continue
        yield list(_entries(data, at + header, end))
        at = data.find(MAGIC, end)


def _entries(data: mmap.mmap, at: int, end: int) -> Iterator[Entry]:
    while at < end:
        kind, _, header, size, stored = struct.unpack_from("<HHIQI", data, at)
        (capability,) = struct.unpack_from("<I", data, at + 28)
        (flags,) = struct.unpack_from("<Q", data, at + 40)
        if kind not in (_PTX, _CUBIN) or not 64 <= header <= 256:
            raise ValueError(f"the device code at byte {at} is of a form that is not known here (kind {kind})")
        yield Entry(kind, capability, at + header, size, stored, bool(flags & _COMPRESSED))
        at += header + size


def kernels(data: mmap.mmap, entry: Entry) -> list[str]:
    """Names of a cubin's kernels, as the compiler mangles them. Needs the command zstd."""
    content = data[entry.start : entry.start + (entry.stored if entry.compressed else entry.size)]
    if entry.compressed:
        content = subprocess.run(["zstd", "-dcq"], input=content, capture_output=True, check=True).stdout
    (sections_at,) = struct.unpack_from("<Q", content, 40)
    size, count = struct.unpack_from("<HH", content, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", content, sections_at + number * size) for number in range(count)]
    names = []
    for _, kind, _, _, start, length, link, *_ in sections:
        if kind != _SYMBOLS:
            continue
        strings = sections[link][4]
        for at in range(start, start + length, 24):
            name, info, other = struct.unpack_from("<IBB", content, at)
            if info & 15 == _FUNCTION and other & _IS_KERNEL:
                first = strings + name
                names.append(content[first : content.index(b"\0", first)].decode())
    return names


@dataclass(frozen=True)
class Reduced:
    """What `reduce` left: containers and bytes of device code, and those that it zeroed though they are of the kept
    architecture.
    """

    containers: int
    bytes: int
    unused_containers: int
    unused_bytes: int


def reduce(library: Path, capability: int, unused: str) -> Reduced:
    """Zero, in place, the device code of all architectures but one; of that one, the containers that are not used.

    Args:
        library: the file.
        capability: to keep, 90 for 9.0.
        unused: regular expression; a container goes whose kernels all match, and that has some.

    Raises:
        ValueError: the file holds no device code for `capability`.
    """
    kept, gone, kept_bytes, gone_bytes = 0, 0, 0, 0
    pattern = re.compile(unused)
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for entries in containers(data):
            for entry in entries:
                if entry.kind == _CUBIN and entry.capability == capability:
                    names = kernels(data, entry)
                    if not names or not all(pattern.search(name) for name in names):
                        kept, kept_bytes = kept + 1, kept_bytes + entry.size
                        continue
                    gone, gone_bytes = gone + 1, gone_bytes + entry.size
                data[entry.start : entry.start + entry.size] = bytes(entry.size)
    if not kept:
        raise ValueError(f"{library} has no device code for compute capability {capability / 10}")
    return Reduced(kept, kept_bytes, gone, gone_bytes)
