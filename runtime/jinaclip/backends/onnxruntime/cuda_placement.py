"""Checks of the devices on which ONNX Runtime placed the operators of a graph. Only shape arithmetic may be on the CPU,
and no operator may need cuDNN if it is not installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinaclip.backends.cuda.libraries import CUDNN, load
from jinaclip.backends.onnxruntime.cuda_provider import PROVIDER
from jinaclip.errors import BackendError, BackendMissing

# Operators that compute shapes, which ONNX Runtime places on the CPU intentionally. Any other operator on the CPU would
# copy activations to the host and back.
ON_HOST = frozenset(
    "Shape Size Gather Concat Squeeze Unsqueeze Slice Cast Range Constant Reshape ConstantOfShape Add Sub Mul Div "
    "Identity MemcpyFromHost MemcpyToHost".split()
)
# Operators whose CUDA kernels call cuDNN, which is not a dependency of jinaclip.
NEEDS_CUDNN = frozenset(
    "Conv ConvTranspose ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMin ReduceProd ReduceSumSquare "
    "ArgMax ArgMin BatchNormalization InstanceNormalization AveragePool MaxPool GlobalAveragePool GlobalMaxPool LSTM "
    "GRU RNN LRN".split()
)


def host_operators(session: Any) -> dict[str, int]:
    """Count the operators placed on the CPU, shape arithmetic excluded. The onnxruntime session must have been opened
    with `session.record_ep_graph_assignment_info`.
    """
    return {
        op: count for (provider, op), count in _placed(session).items() if provider != PROVIDER and op not in ON_HOST
    }


def _placed(session: Any) -> Counter[tuple[str, str]]:
    """The number of operators of each provider, by (provider, operator type)."""
    parts = session.get_provider_graph_assignment_info()
    return Counter((part.ep_name, node.op_type) for part in parts for node in part.get_nodes())


def require_usable_placement(session: Any, path: Path) -> None:
    """Check the placement of a graph's operators.

    Args:
        session: the onnxruntime session, as for `host_operators`.
        path: the .onnx file.

    Raises:
        BackendError: operators other than shape arithmetic are placed on the CPU.
        BackendMissing: operators need cuDNN and it is not found.
    """
    if found := host_operators(session):
        raise BackendError(
            f"onnxruntime would run part of this graph on the host ({_listed(found)}), copying activations there and "
            "back; upgrade onnxruntime-gpu, or use device='cpu'"
        )
    placed = _placed(session)
    found = {op: count for (provider, op), count in placed.items() if provider == PROVIDER and op in NEEDS_CUDNN}
    if found and load(CUDNN) is None:
        raise BackendMissing(
            f"{path.name} has operators that need cuDNN on a GPU ({_listed(found)}), and {CUDNN} is not found; run "
            "`jinaclip build BUNDLE --device cuda`, which replaces them in fp16, or export the bundle again"
        )


def _listed(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {op_type}" for op_type, count in sorted(found.items()))
