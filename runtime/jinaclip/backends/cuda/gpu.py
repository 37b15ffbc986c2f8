"""Detection of the NVIDIA GPUs that this process can use, through the driver's libcuda only.

This happens before any use of CUDA or TensorRT, because constructing TensorRT's objects without a driver can end the
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
    """A GPU.

    Attributes:
        index: CUDA's number of the device, which depends on CUDA_VISIBLE_DEVICES.
        name: name of the model, such as "NVIDIA H200".
        capability: compute capability, such as "9.0".
        sm_count: number of multiprocessors. A MIG instance has fewer than the whole GPU.
        memory_mib: memory, in MiB.
        driver: newest CUDA version that the driver supports, such as "13.0".
    """

    index: int
    name: str
    capability: str
    sm_count: int
    memory_mib: int
    driver: str

    @property
    def sm(self) -> str:
        """The architecture, such as "sm90" for capability 9.0."""
        return "sm" + self.capability.replace(".", "")

    def facts(self) -> dict[str, Any]:
        """The facts that an engine depends on: all attributes except the index and the driver."""
        return {name: value for name, value in asdict(self).items() if name not in ("index", "driver")}

    def __str__(self) -> str:
        return f"{self.name} (capability {self.capability}, {self.sm_count} SMs, {self.memory_mib} MiB)"


def version_of(text: str) -> tuple[int, int]:
    """Major and minor version: (11, 4) for "11.4.0.106"."""
    major, minor, *_ = [*(int(number) for number in re.findall(r"\d+", text)), 0, 0]
    return major, minor


def device_index(device: str) -> int:
    """The number in a device name: 0 for "cuda", 1 for "cuda:1".

    Raises:
        InputError: the name has another form.
    """
    found = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if found is None:
        raise InputError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N")
    return int(found[1] or 0)


def gpu(index: int = 0) -> Gpu:
    """The GPU with this number.

    Raises:
        BackendMissing: there is no driver, or no GPU with this number; the message lists the GPUs.
    """
    found, problem = _ask_driver()
    if problem:
        raise BackendMissing(problem)
    if index >= len(found):
        names = ", ".join(f"cuda:{device.index} {device.name}" for device in found)
        raise BackendMissing(f"there is no device cuda:{index}; available devices: {names}")
    return found[index]


def driver_problem() -> str | None:
    """Why no GPU can be used on this machine, as a message; None if one can."""
    return _ask_driver()[1]


@cache
def _ask_driver() -> tuple[tuple[Gpu, ...], str | None]:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return (), "no NVIDIA driver was found (libcuda.so.1 is missing)"
    error = cuda.cuInit(0)
    if error and error != _NO_DEVICE:
        return (), f"the NVIDIA driver finds no usable GPU (cuInit returned {error})"
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    if error == _NO_DEVICE or count.value == 0:
        return (), "the NVIDIA driver shows no GPU to this process; check CUDA_VISIBLE_DEVICES"
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
