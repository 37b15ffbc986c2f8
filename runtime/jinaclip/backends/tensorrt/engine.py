"""A loaded TensorRT or TensorRT-RTX plan: its tensors, its execution contexts, and the cache of kernels that
TensorRT-RTX compiles.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.backends.cuda.gpu import Gpu
from jinaclip.backends.shapes import Bucket, Profile
from jinaclip.backends.tensorrt.library import Library, Messages, logger_of
from jinaclip.bundle.files import write_atomically
from jinaclip.errors import BackendError, EngineMismatch


@dataclass(frozen=True)
class Plan:
    """A plan that is valid for this machine.

    Attributes:
        key: the engine's key.
        path: the plan file.
        profiles: the plan's profiles, in order.
    """

    key: str
    path: Path
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Attributes:
        name: name of the tensor.
        dtype: its dtype.
        row: its shape without the batch dimension; (-1,) for token ids.
    """

    name: str
    dtype: np.dtype[Any]
    row: tuple[int, ...]

    @property
    def has_tokens(self) -> bool:
        """Whether rows are token ids, with variable length."""
        return self.row == (-1,)

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """Shape for a batch of this bucket."""
        return (bucket.rows, *((bucket.tokens or 1,) if self.has_tokens else self.row))

    def bytes(self, bucket: Bucket) -> int:
        """Size for a batch of this bucket, in bytes."""
        return int(np.prod(self.shape(bucket), dtype=np.int64)) * self.dtype.itemsize


class Engine:
    """A loaded plan. Its contexts must be freed before it is closed.

    Args:
        plan: the plan.
        gpu: the GPU that it was built for.
        library: the library that built it.
        kernels: file for the kernels that TensorRT-RTX compiles for this GPU. None does not store them. TensorRT
            compiles no kernels at run time.

    Attributes:
        source: the engine's only input.
        outputs: its outputs, in order.
        context_bytes: memory for activations that each context needs: enough for the largest profile.
        captures: whether jinaclip captures CUDA graphs. TensorRT-RTX does this itself.

    Raises:
        EngineMismatch: the library cannot load the plan, or the plan has another number of profiles.
    """

    def __init__(self, plan: Plan, *, gpu: Gpu, library: Library, kernels: Path | None = None) -> None:
        self.library, self.profiles = library, plan.profiles
        self.captures = library.backend != "tensorrt-rtx"
        self._kernels = None if self.captures else kernels
        self._kernels_saved = b""
        self._runtime_cache: Any = None
        trt = library.module
        with Messages(library) as messages:
            self._runtime: Any = trt.Runtime(logger_of(library))
            self._engine: Any = self._runtime.deserialize_cuda_engine(np.memmap(plan.path, np.uint8, "r"))
        if self._engine is None:
            raise EngineMismatch(
                f"{library.backend} {library.version} on {gpu} cannot load {plan.key}: {messages.errors()}; "
                f"build it again on this machine: jinaclip build BUNDLE --backend {library.backend} --force"
            )
        if self._engine.num_optimization_profiles != len(self.profiles):
            raise EngineMismatch(
                f"{plan.key} has {self._engine.num_optimization_profiles} profiles, its sidecar lists "
                f"{len(self.profiles)}; build it again"
            )
        self.context_bytes = int(self._engine.device_memory_size_v2)
        inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            tensor = Tensor(name, dtype, tuple(self._engine.get_tensor_shape(name))[1:])
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (inputs if is_input else self.outputs).append(tensor)
        (self.source,) = inputs

    def context(self, profile: int, memory: int, stream: int) -> Any:
        """Create an execution context for one profile.

        Args:
            profile: number of the profile.
            memory: address of `context_bytes` on the device. Contexts can share it if they never run at the same time.
            stream: the cudaStream_t in which the profile is set. Wait for it before the context runs in another stream.

        Raises:
            BackendError: the library does not create the context or does not accept the profile.
        """
        name = self.profiles[profile].name
        with Messages(self.library) as messages:
            context = self._engine.create_execution_context(self._context_settings())
            if context is None:
                raise BackendError(
                    f"{self.library.backend} cannot create a context for profile {name}: {messages.errors()}"
                )
            if not context.set_optimization_profile_async(profile, stream):
                raise BackendError(f"{self.library.backend} does not accept profile {name}: {messages.errors()}")
        context.set_device_memory(memory, self.context_bytes)
        return context

    def save_kernels(self) -> None:
        """Save the kernels that TensorRT-RTX has compiled since the last save, if the file can be written."""
        if self._kernels is not None and self._runtime_cache is not None:
            content = bytes(memoryview(self._runtime_cache.serialize()))
            if content not in (b"", self._kernels_saved):
                with suppress(OSError):
                    write_atomically(self._kernels, content)
                    self._kernels_saved = content

    def close(self) -> None:
        """Free the engine."""
        self._runtime_cache = None
        self._engine = None
        self._runtime = None

    def _context_settings(self) -> Any:
        trt = self.library.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.captures:
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # Kernels are compiled for the exact shape at its first run. The library captures and replays graphs itself.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._runtime_cache is None:
            self._runtime_cache = config.create_runtime_cache()
            if self._kernels is not None:
                with suppress(OSError):
                    content = self._kernels.read_bytes()
                    if self._runtime_cache.deserialize(content):  # False for the cache of another GPU
                        self._kernels_saved = content
        config.set_runtime_cache(self._runtime_cache)
        return config
