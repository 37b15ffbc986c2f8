"""Graphs over the CUDA operators, run on a CPU: with the host build of the operators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime


def run_operators(path: Path, library: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a graph by name.

    Args:
        path: a graph that `for_cuda(…, operators=True)` made.
        library: the host build of the operators.
    """
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    used = {value.name for value in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in inputs.items() if k in used}), strict=True))


def packed(texts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of a packed text graph: ids of each text, without padding."""
    lengths = [len(text) for text in texts]
    return {
        "input_ids": np.concatenate(texts).astype(np.int64),
        "positions": np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        "offsets": np.cumsum([0, *lengths]).astype(np.int32),
        "token_offset": np.full((len(texts), max(lengths)), -1, np.int32),  # only its shape is read
    }
