"""A session of ONNX Runtime on a GPU: its CUDA provider and no other, inputs and outputs bound to the device.

Small batches are padded to a bucket (jinaclip.buckets) and run as CUDA graphs, which cost one launch instead of
hundreds; larger ones run as they are.
"""

from __future__ import annotations

import io
import os
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.buckets import Profile, bucket_for, pad_into
from jinaclip.errors import BackendError, BackendMissing, BundleError
from jinaclip.gpu import Gpu
from jinaclip.packing import GPU_COST
from jinaclip.sessions import (
    Arrays,
    available_threads,
    first_line,
    import_onnxruntime,
    keep_after_fork,
    onnxruntime_version,
    require_open,
    session_options,
)

PROVIDER = "CUDAExecutionProvider"
# Operators that only reckon with shapes; ONNX Runtime keeps those beside the host on purpose. Any other one there would
# copy activations to the host and back.
ON_HOST = {
    "Shape", "Size", "Gather", "Concat", "Squeeze", "Unsqueeze", "Slice", "Cast", "Range", "Constant", "Reshape",
    "ConstantOfShape", "Add", "Sub", "Mul", "Div", "Identity", "MemcpyFromHost", "MemcpyToHost",
}  # fmt: skip
# Up to so many tokens, or images, launching kernels takes as long as running them: there a graph is worth its padding.
GRAPH_TOKENS, GRAPH_IMAGES, MOST_GRAPHS = 4096, 4, 64
_SKIP_GRAPH = "-1"


def cuda_problem() -> str | None:
    """Why the installed onnxruntime has no CUDA provider, in words; None if it has."""
    ort = import_onnxruntime()
    if PROVIDER in ort.get_available_providers():
        return None
    return f"the installed onnxruntime {ort.__version__} has no CUDA provider; run: pip install 'jinaclip[cuda]'"


class OnnxRuntimeCudaSession:
    """ONNX Runtime on one GPU. Safe to call from several threads at once; runs are one after the other.

    Args:
        path: the .onnx file; its weights lie beside it.
        gpu: that is there (jinaclip.gpu.gpu).
        prepared: key of a prepared graph; None for a bundle's own.
        pad: token id that fills the rest of a row.
        graphs: run small batches as CUDA graphs.

    Raises:
        BackendMissing: onnxruntime has no CUDA provider, or it does not start here.
        BundleError: the file is not a graph that onnxruntime accepts.
        BackendError: part of the graph would run on the host.
    """

    backend = "onnxruntime"
    tiled_above: int | None = 0  # flash attention never writes its scores
    concurrency = 1
    cost = GPU_COST

    def __init__(self, path: Path, *, gpu: Gpu, prepared: str | None = None, pad: int = 0, graphs: bool = True) -> None:
        if problem := cuda_problem():
            raise BackendMissing(f"device cuda: {problem}")
        ort = import_onnxruntime()
        self._said = _load_cuda_libraries(ort)
        self.device, self.threads, self.prepared = f"cuda:{gpu.index}", available_threads(), prepared
        self._ort, self._gpu, self._pad = ort, gpu, pad
        self._process = os.getpid()
        keep_after_fork(self)
        self._lock = threading.Lock()
        self._session = self._open(path, graphs)
        _require_on_device(self._session)
        (source,) = self._session.get_inputs()
        self._input, self._names = source.name, [output.name for output in self._session.get_outputs()]
        self._dtype = np.dtype({"tensor(uint8)": np.uint8, "tensor(int64)": np.int64}.get(source.type, np.float32))
        most = (1, 1, GRAPH_TOKENS)
        is_text = len(source.shape) == 2
        self._bucketed = (Profile("graphs", most if is_text else (1, 1, GRAPH_IMAGES), most if is_text else None),)
        self._graphs: dict[tuple[int, ...], tuple[Any, Any]] = {}  # in the order of their ids

    def run(
        self, inputs: Arrays, *, interruptible: bool = False, release_memory: bool = False
    ) -> dict[str, np.ndarray]:
        session = self._checked()
        (batch,) = inputs.values()
        if set(inputs) != {self._input}:
            raise BackendError(f"the graph's input is {self._input}, found {', '.join(inputs)}")
        with self._lock:
            try:
                shape = self._bucket(batch) if self._captures else None
                if shape is not None:
                    return self._replay(session, batch, shape)
                options = self._ort.RunOptions()
                if self._captures:
                    options.add_run_config_entry("gpu_graph_id", _SKIP_GRAPH)
                if release_memory:
                    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{self._gpu.index}")
                binding = session.io_binding()
                binding.bind_cpu_input(self._input, np.ascontiguousarray(batch))
                for name in self._names:
                    binding.bind_output(name, "cuda", self._gpu.index)
                session.run_with_iobinding(binding, options)
                return dict(zip(self._names, binding.copy_outputs_to_cpu(), strict=True))
            except Exception as error:  # onnxruntime's exceptions have no common class of their own
                raise BackendError(
                    f"onnxruntime failed to run the graph on {self._gpu}: {first_line(error)}"
                ) from error

    def describe(self) -> dict[str, Any]:
        return onnxruntime_cuda_facts(self._gpu) | {
            "device_index": self._gpu.index,
            "threads": self.threads,
            "providers": self._checked().get_providers(),
            "prepared": self.prepared,
            "cuda_graphs": self._captures,
        }

    def close(self) -> None:
        if os.getpid() == self._process:
            with self._lock:
                self._graphs.clear()
                self._session = None

    def graphs(self) -> int:
        """CUDA graphs that are held now."""
        return len(self._graphs)

    def _open(self, path: Path, graphs: bool) -> Any:
        """The session; without CUDA graphs where this graph's placement does not allow them."""
        problem: Exception | None = None
        for captures in (True, False) if graphs else (False,):
            options = session_options(self._ort)
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            provider = {
                "device_id": self._gpu.index,
                "use_tf32": 0,  # rounds float32 operands to 10 bits, on by default
                "enable_cuda_graph": int(captures),
            }
            try:
                session = self._ort.InferenceSession(
                    str(path), options, providers=[(PROVIDER, provider), "CPUExecutionProvider"], enable_fallback=0
                )
            except Exception as error:
                problem = error
                continue
            if session.get_providers()[0] != PROVIDER:
                raise BackendMissing(
                    f"onnxruntime {self._ort.__version__} opened the graph on {session.get_providers()[0]} instead of "
                    f"{PROVIDER}: its CUDA libraries do not load here (cuBLAS, cuRAND and cudart of CUDA 13); "
                    f"run: pip install 'jinaclip[cuda]'{self._said and f' ({self._said})'}"
                )
            self._captures = captures
            return session
        assert problem is not None
        raise BundleError(
            f"onnxruntime {self._ort.__version__} cannot open {path} on {self._gpu}: {first_line(problem)}; "
            "check the bundle with `jinaclip verify`, or export it again"
        ) from problem

    def _bucket(self, batch: np.ndarray) -> tuple[int, ...] | None:
        """The shape that a small batch is padded to and captured with; None for one that runs as it is."""
        is_text = batch.ndim == 2
        bucket = bucket_for(len(batch), batch.shape[1] if is_text else None, self._bucketed)
        if bucket is None or (is_text and bucket.rows * (bucket.tokens or 0) > GRAPH_TOKENS):
            return None
        shape = (bucket.rows, *((bucket.tokens,) if bucket.tokens else batch.shape[1:]))
        if shape not in self._graphs and len(self._graphs) >= MOST_GRAPHS:  # the provider never forgets one
            return None
        return shape

    def _replay(self, session: Any, batch: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Run a bucket on the arrays that it was captured with."""
        padded = np.empty(shape, self._dtype)
        pad_into(padded, batch, self._pad)
        if shape not in self._graphs:
            device = ("cuda", self._gpu.index)
            source = self._ort.OrtValue.ortvalue_from_numpy(padded, *device)
            width = {output.name: output.shape[1] for output in session.get_outputs()}
            outputs = {
                name: self._ort.OrtValue.ortvalue_from_shape_and_type([shape[0], width[name]], np.float32, *device)
                for name in self._names
            }
            binding = session.io_binding()
            binding.bind_ortvalue_input(self._input, source)
            for name, value in outputs.items():
                binding.bind_ortvalue_output(name, value)
            self._graphs[shape] = (binding, (source, outputs))
        binding, (source, outputs) = self._graphs[shape]
        source.update_inplace(padded)
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(1 + list(self._graphs).index(shape)))
        session.run_with_iobinding(binding, options)
        return {name: value.numpy()[: len(batch)].copy() for name, value in outputs.items()}

    def _checked(self) -> Any:
        require_open(self._process, self._session)
        return self._session


def _load_cuda_libraries(ort: Any) -> str:
    """CUDA's libraries, from their wheels where they are installed as such; what onnxruntime says of it, in one line.

    It says so on stdout, where data goes.
    """
    said = io.StringIO()
    with redirect_stdout(said):
        ort.preload_dlls(cudnn=False)
    return " ".join(said.getvalue().split())[:300]


def onnxruntime_cuda_facts(gpu: Gpu) -> dict[str, Any]:
    """What decides a graph's numbers on this GPU, known before one is opened: part of every `describe()`."""
    return {
        "backend": OnnxRuntimeCudaSession.backend,
        "version": onnxruntime_version(),
        "device": "cuda",
        "gpu": str(gpu),
        "driver": gpu.driver,
    }


def host_operators(session: Any) -> dict[str, int]:
    """Operators that an onnxruntime session runs on the host though they do more than reckon with shapes, with how
    many there are. The session was opened with `session.record_ep_graph_assignment_info`.
    """
    found: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != PROVIDER:
            for node in part.get_nodes():
                if node.op_type not in ON_HOST:
                    found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def _require_on_device(session: Any) -> None:
    if found := host_operators(session):
        what = ", ".join(f"{count} {op_type}" for op_type, count in sorted(found.items()))
        raise BackendError(
            f"onnxruntime would run part of this graph on the host ({what}), copying activations there and back; "
            "upgrade onnxruntime-gpu, or use device='cpu'"
        )
