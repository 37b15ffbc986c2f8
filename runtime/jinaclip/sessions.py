"""The one seam between jinaclip and what runs a graph: `Session.run(inputs) -> outputs`, plus what it is.

A session runs on one device with one provider: what was asked for is given or refused, never replaced.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jinaclip.errors import BackendError, BackendMissing, BundleError, InputError
from jinaclip.packing import CPU_COST, RunCost

Arrays = Mapping[str, np.ndarray]

# What decides which kernels run and how weights are packed for them, as the kernel names it.
_FEATURES = {
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
}  # fmt: skip


class Session(Protocol):
    """A graph that is ready to run. Safe to call from several threads at once."""

    backend: str
    device: str
    threads: int
    concurrency: int  # runs that gain from being asked for at the same time
    cost: RunCost
    tiled_above: int | None  # texts without padding of more tokens need no memory for all scores; None: all do

    def run(
        self, inputs: Arrays, *, outputs: Sequence[str] | None = None, interruptible: bool = False,
        release_memory: bool = False,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Outputs by name.

        Args:
            outputs: names of those that are wanted; None: all.
            interruptible: let Ctrl-C end a long run in the main thread.
            release_memory: give the run's memory back to the system, instead of keeping it for the next.
        """

    def describe(self) -> dict[str, Any]:
        """What runs this graph, for info() and certificates; JSON values only."""

    def close(self) -> None:
        """Free the graph; running it afterwards is an error."""


def available_threads() -> int:
    """Cores this process may use: CPU affinity, cut by the cgroup's CPU quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cores, math.ceil(quota) if quota else cores))


def _cgroup_quota(root: Path) -> float | None:
    """CPUs granted by the cgroup (version 2, then 1), or None where there is no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    if quota.strip() in ("max", "-1") or int(period) <= 0:
        return None
    return int(quota) / int(period)


# Fusions of onnxruntime whose kernels are slower on a CPU than what they replace (DECISIONS.md 14).
SLOW_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]


def session_options(ort: Any) -> Any:
    """What every session is opened with."""
    options = _plain_options(ort)
    if not sums_bytes_exactly():
        options.add_session_config_entry("session.x64quantprecision", "1")  # exact kernels, which are slower
    return options


def _plain_options(ort: Any) -> Any:
    options = ort.SessionOptions()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors arrive as exceptions; nothing is printed
    options.enable_mem_pattern = False  # one memory plan per text length would never be freed
    return options


# onnx.helper's serialisation of y = MatMulInteger(a, b): a uint8 [2, 8], b int8 [8, 16], y int32; opset 13.
_PRODUCT_OF_BYTES = (
    b'\x08\x07:\\\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01gZ\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x02\n'
    b"\x02\x08\x08Z\x13\n\x01b\x12\x0e\n\x0c\x08\x03\x12\x08\n\x02\x08\x08\n\x02\x08\x10b\x13\n\x01y\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08"
    b"\x02\n\x02\x08\x10B\x04\n\x00\x10\r"
)


@cache
def sums_bytes_exactly() -> bool:
    """Whether onnxruntime's fast kernel for products of bytes, u8 × s8, is exact on this CPU.

    Without VNNI it adds pairs of products in 16 bits, which saturate. The kernel itself is asked, with the largest
    values there are: which CPUs have which kernels only onnxruntime knows (DECISIONS.md 18).
    """
    ort = import_onnxruntime()
    session, _ = open_onnxruntime(ort, _PRODUCT_OF_BYTES, _plain_options(ort), None)
    (sums,) = session.run(None, {"a": np.full((2, 8), 255, np.uint8), "b": np.full((8, 16), 127, np.int8)})
    return bool((sums == 8 * 255 * 127).all())


def open_onnxruntime(ort: Any, graph: Path | bytes, options: Any, threads: int | None) -> tuple[Any, int]:
    """An `onnxruntime.InferenceSession` on the CPU, and the cores that it uses.

    It gets threads of its own, but in a process that has one pool for all sessions (`share_threads`, or a host's own
    onnxruntime.set_global_thread_pool_sizes): there onnxruntime opens nothing else, and does not tell beforehand.

    Raises:
        BackendError: `threads` was given, and the process has such a pool of another size.
        Exception: what onnxruntime says of the graph.
    """
    model = graph if isinstance(graph, bytes) else str(graph)
    options.intra_op_num_threads = threads or available_threads()
    settings = {
        "providers": ["CPUExecutionProvider"],
        "disabled_optimizers": SLOW_FUSIONS,
        "enable_fallback": 0,  # or it prints to stdout and tries another provider, when it opens and when it runs
    }
    try:
        return ort.InferenceSession(model, options, **settings), options.intra_op_num_threads
    except RuntimeError as error:
        if "global thread pool" not in str(error):
            raise
    if threads not in (None, _shared_threads):
        size = "the host's size" if _shared_threads is None else f"{_shared_threads} threads"
        raise BackendError(
            f"threads={threads} was asked for, but all onnxruntime sessions of this process share one pool of {size}; "
            "leave threads out"
        )
    options.use_per_session_threads = False
    options.intra_op_num_threads = options.inter_op_num_threads = 0  # anything else is warned of on stderr
    return ort.InferenceSession(model, options, **settings), _shared_threads or available_threads()


_shared_threads: int | None = None  # of the pool that share_threads made


def share_threads(threads: int | None = None) -> None:
    """One pool of threads for all models of this process, instead of one for each tower.

    Two towers that are busy at the same time then do not compete for the cores. Call it once, before anything opens an
    onnxruntime session. It is for programs that own their process: onnxruntime makes the pool process-wide, and a
    session of another library that asks for threads of its own, as is the default, no longer opens.

    Args:
        threads: cores; None takes `available_threads()`.

    Raises:
        InputError: `threads` is no whole number from 1.
        BackendError: this process has opened sessions with threads of their own already, or shares another number.
    """
    global _shared_threads
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InputError(f"threads is {threads!r}, expected None or a whole number from 1")
    wanted = threads or available_threads()
    if _shared_threads == wanted:
        return
    if _shared_threads is not None or _opened:
        found = f"shares {_shared_threads} threads" if _shared_threads else "has opened models"
        raise BackendError(f"this process {found} already; call share_threads once, before the first ClipModel")
    import_onnxruntime().set_global_thread_pool_sizes(wanted, 1)
    _shared_threads = wanted


class OnnxRuntimeSession:
    """ONNX Runtime on the CPU.

    Args:
        path: the .onnx file; its weights lie beside it.
        threads: cores for one run; None takes `available_threads()`.
        prepared: key of a prepared graph, which is opened as it is; None for a bundle's own, which is optimised now.
        tiled_above: of a prepared graph.
        cost: of a run of this graph.

    Raises:
        BackendMissing: onnxruntime is not installed.
        BundleError: the file is not a graph that onnxruntime accepts.
    """

    backend = "onnxruntime"
    concurrency = 1

    def __init__(
        self, path: Path, *, threads: int | None = None,
        prepared: str | None = None, tiled_above: int | None = None, cost: RunCost = CPU_COST,
    ) -> None:  # fmt: skip
        ort = import_onnxruntime()
        self.device = "cpu"
        self.prepared, self.tiled_above, self.cost = prepared, tiled_above, cost
        options = session_options(ort)
        if prepared is not None:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session, self.threads = open_onnxruntime(ort, path, options, threads)
        except BackendError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common class of their own
            raise BundleError(
                f"onnxruntime {ort.__version__} cannot open {path}: {first_line(error)}; "
                "check the bundle with `jinaclip verify`, or export it again"
            ) from error
        self._ort = ort
        self._process = os.getpid()
        keep_after_fork(self)
        global _opened
        _opened = True

    def run(
        self, inputs: Arrays, *, outputs: Sequence[str] | None = None, interruptible: bool = False,
        release_memory: bool = False,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        session = self._checked()
        options = self._ort.RunOptions()
        if release_memory:  # otherwise the arena stays at the size of the largest run ever seen
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        names = list(outputs or (output.name for output in session.get_outputs()))
        try:
            if interruptible and threading.current_thread() is threading.main_thread():
                values = _run_interruptibly(session, names, inputs, options)
            else:
                values = session.run(names, dict(inputs), options)
        except Exception as error:  # as above: no common class
            raise BackendError(f"onnxruntime failed to run the graph: {first_line(error)}") from error
        return dict(zip(names, values, strict=True))

    def describe(self) -> dict[str, Any]:
        return {
            **onnxruntime_facts(),
            "graph": self.prepared or "standard",
            "providers": self._checked().get_providers(),
            "threads": self.threads,
        }

    def close(self) -> None:
        if os.getpid() == self._process:
            self._session = None

    def _checked(self) -> Any:
        require_open(self._process, self._session)
        return self._session


def require_open(process: int, handle: object) -> None:
    """Refuse a session that was opened in another process, or is closed.

    Args:
        process: id of the process that opened it.
        handle: what it runs; None once it is closed.
    """
    if os.getpid() != process:
        raise BackendError(
            f"this model was opened in process {process} and does not work after a fork in process {os.getpid()}; "
            "open a ClipModel in each process, or start processes with 'spawn'"
        )
    if handle is None:
        raise BackendError("this model is closed; open a new ClipModel")


def onnxruntime_facts() -> dict[str, str]:
    """What decides a graph's numbers on this machine, known before one is opened: part of every `describe()`."""
    return {
        "backend": OnnxRuntimeSession.backend,
        "version": onnxruntime_version(),
        "device": "cpu",
        "cpu": _cpu_model(),
        "cpu_features": " ".join(cpu_features()),
    }


@cache
def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Instruction sets that kernels are chosen by, sorted; where nothing tells, the processor's name."""
    with suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return tuple(sorted(_FEATURES & set(value.split())))
    return (platform.processor() or platform.machine(),)


@cache
def _cpu_model() -> str:
    """What the kernels are chosen for: the CPU's name where the kernel tells, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def onnxruntime_version() -> str:
    """Version of the installed onnxruntime."""
    version: str = import_onnxruntime().__version__
    return version


def import_onnxruntime() -> Any:
    """The onnxruntime module, imported with its telemetry off.

    Since 1.29 its wheels start a telemetry thread and write under the home directory with the first session;
    only this variable, set before the import, prevents it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissing("onnxruntime is not installed; run: pip install 'jinaclip[cpu]'") from error
    return onnxruntime


def _run_interruptibly(session: Any, names: list[str], inputs: Arrays, options: Any) -> Any:
    """Run in a helper thread, so that Ctrl-C reaches this one and ends the run between two nodes."""
    with ThreadPoolExecutor(1, thread_name_prefix="jinaclip-run") as pool:
        future = pool.submit(session.run, names, dict(inputs), options)
        try:
            return future.result()
        except KeyboardInterrupt:
            options.terminate = True
            raise


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]


_opened = False  # whether this process has opened a session
_live: weakref.WeakSet[Session] = weakref.WeakSet()


def keep_after_fork(session: Session) -> None:
    """Never free this session in a forked child: its library joins threads and calls devices that are not there. Its
    `close` must do nothing in another process.
    """
    _live.add(session)


def _keep_all() -> None:
    for session in list(_live):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_all)
