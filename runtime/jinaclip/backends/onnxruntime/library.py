"""The onnxruntime module: its import, session options, thread pools, and a check of its int8 kernels."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.backends.machine import available_threads
from jinaclip.errors import BackendError, BackendMissing, InputError

# Fusions of onnxruntime whose kernels are slower on a CPU than the operators they replace (docs/decisions/014).
SLOW_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]
_shared_threads: int | None = None  # size of the pool that share_threads made
_opened = False  # whether this process has opened a session with threads of its own


def session_options(ort: Any) -> Any:
    """The options that all sessions are opened with."""
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


# The graph y = MatMulInteger(a, b), serialised by onnx.helper: a uint8 [2, 8], b int8 [8, 16], y int32; opset 13.
_PRODUCT_OF_BYTES = (
    b'\x08\x07:\\\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01gZ\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x02\n'
    b"\x02\x08\x08Z\x13\n\x01b\x12\x0e\n\x0c\x08\x03\x12\x08\n\x02\x08\x08\n\x02\x08\x10b\x13\n\x01y\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08"
    b"\x02\n\x02\x08\x10B\x04\n\x00\x10\r"
)


@cache
def sums_bytes_exactly() -> bool:
    """Whether onnxruntime's fast kernel for products of bytes, u8 × s8, is exact on this CPU.

    On CPUs without VNNI the kernel adds pairs of products in 16 bits, which saturate. Which kernel runs on which CPU is
    internal to onnxruntime, so this runs the kernel with the largest possible values (docs/decisions/018).
    """
    ort = import_onnxruntime()
    session, _ = open_onnxruntime(ort, _PRODUCT_OF_BYTES, _plain_options(ort), None)
    (sums,) = session.run(None, {"a": np.full((2, 8), 255, np.uint8), "b": np.full((8, 16), 127, np.int8)})
    return bool((sums == 8 * 255 * 127).all())


def open_onnxruntime(ort: Any, graph: Path | bytes, options: Any, threads: int | None) -> tuple[Any, int]:
    """Open a session on the CPU.

    The session gets its own threads, unless the process has one pool for all sessions (from `share_threads`, or the
    application's call of onnxruntime.set_global_thread_pool_sizes). onnxruntime then refuses sessions with their own
    threads, and the only way to detect this is to try.

    Args:
        ort: the onnxruntime module.
        graph: path of the .onnx file, or its content.
        options: the session options.
        threads: cores for one run. None uses `available_threads()`.

    Returns:
        The onnxruntime.InferenceSession, and its number of threads.

    Raises:
        BackendError: the process has a pool for all sessions, and its size is not `threads`.
        Exception: onnxruntime cannot open the graph.
    """
    model = graph if isinstance(graph, bytes) else str(graph)
    options.intra_op_num_threads = threads or available_threads()
    settings = {
        "providers": ["CPUExecutionProvider"],
        "disabled_optimizers": SLOW_FUSIONS,
        "enable_fallback": 0,  # otherwise onnxruntime prints to stdout and retries with another provider after errors
    }
    global _opened
    try:
        session = ort.InferenceSession(model, options, **settings)
        _opened = True
        return session, options.intra_op_num_threads
    except RuntimeError as error:
        if "global thread pool" not in str(error):
            raise
    if threads not in (None, _shared_threads):
        size = "the host's size" if _shared_threads is None else f"{_shared_threads} threads"
        raise BackendError(
            f"threads is {threads}, but all onnxruntime sessions of this process share one pool of {size}; do not pass "
            "threads"
        )
    options.use_per_session_threads = False
    options.intra_op_num_threads = options.inter_op_num_threads = 0  # other values cause a warning on stderr
    return ort.InferenceSession(model, options, **settings), _shared_threads or available_threads()


def share_threads(threads: int | None = None) -> None:
    """Use one thread pool for all models of this process, instead of one for each tower.

    Two towers that run at the same time then do not compete for the cores. Call this once, before any onnxruntime
    session is opened. Use it only in applications that control the whole process: the pool applies to all onnxruntime
    sessions, and sessions of other libraries with their own threads, which is the default, fail to open.

    Args:
        threads: number of cores. None uses `available_threads()`.

    Raises:
        InputError: `threads` is not a whole number from 1.
        BackendError: this process has already opened sessions with their own threads, or has a pool of another size.

    Examples:
        >>> share_threads(2)
        >>> model = ClipModel("bundle/")
        >>> model.info()["towers"]["text"]["threads"]
        2
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


def import_onnxruntime() -> Any:
    """Import the onnxruntime module with telemetry disabled.

    Since version 1.29, the first session starts a telemetry thread and writes to the home directory. Setting this
    variable before the import is the only way to prevent it.

    Raises:
        BackendMissing: onnxruntime is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissing("onnxruntime is not installed; run: pip install 'jinaclip[cpu]'") from error
    return onnxruntime


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
