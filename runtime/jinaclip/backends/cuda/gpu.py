"""Which NVIDIA GPUs this process may use, asked of the driver itself: needs no library but libcuda.

Asked before anything of CUDA or TensorRT is touched: constructing TensorRT's objects without a driver can end the
process.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from jinaclip.errors import BackendMissing, InputError

_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE, from cuda.h
# CUdevice_attribute, from cuda.h.
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        index: as CUDA numbers them, CUDA_VISIBLE_DEVICES considered.
        name: "NVIDIA H200".
        capability: "9.0".
        sm_count: multiprocessors; a MIG slice has fewer than the whole.
        memory_mib: its memory, in MiB.
        driver: the CUDA version that the driver serves: "13.0".
    """

    index: int
    name: str
    capability: str
    sm_count: int
    memory_mib: int
    driver: str

    @property
    def sm(self) -> str:
        """ "sm90" of capability 9.0."""
        return "sm" + self.capability.replace(".", "")

    def facts(self) -> dict[str, Any]:
        """What an engine is tied to: all but the index and the driver."""
        return {name: value for name, value in asdict(self).items() if name not in ("index", "driver")}

    def __str__(self) -> str:
        return f"{self.name} (capability {self.capability}, {self.sm_count} SMs, {self.memory_mib} MiB)"


def device_index(device: str) -> int:
    """0 of "cuda", 1 of "cuda:1".

    Raises:
        InputError: it is neither.
    """
    found = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if found is None:
        raise InputError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N")
    return int(found[1] or 0)


def gpu(index: int = 0) -> Gpu:
    """The device with this number.

    Raises:
        BackendMissing: there is no driver, or no such device; says which there are.
    """
    found, problem = _ask_driver()
    if problem:
        raise BackendMissing(problem)
    if index >= len(found):
        names = ", ".join(f"cuda:{device.index} {device.name}" for device in found)
        raise BackendMissing(f"there is no device cuda:{index}; here are {names}")
    return found[index]


def driver_problem() -> str | None:
    """Why no GPU can be used here, in words; None if one can."""
    return _ask_driver()[1]


@cache
def _ask_driver() -> tuple[tuple[Gpu, ...], str | None]:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return (), "there is no NVIDIA driver here (libcuda.so.1 is not found)"
    error = cuda.cuInit(0)
    if error and error != _NO_DEVICE:
        return (), f"the NVIDIA driver finds no usable GPU (cuInit says {error})"
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    if error == _NO_DEVICE or count.value == 0:
        return (), "the NVIDIA driver shows no GPU to this process; see CUDA_VISIBLE_DEVICES"
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return tuple(_device(cuda, index, driver) for index in range(count.value)), None


def _device(cuda: ctypes.CDLL, index: int, driver: str) -> Gpu:
    handle, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
        return value.value

    return Gpu(
        index=index,
        name=name.value.decode("utf-8", "replace"),
        capability=f"{attribute(_MAJOR)}.{attribute(_MINOR)}",
        sm_count=attribute(_MULTIPROCESSORS),
        memory_mib=memory.value >> 20,
        driver=driver,
    )
