"""A tower's fp32 graph without its weights: the .onnx file as it was exported, and how to fill the file beside it.

An exported graph keeps all its constants in `<graph>.data`. Those that are a parameter or buffer of the tower, with its
axes in some order, are recognised by their contents; the others are small and are carried as they are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

MOST_CARRIED = 1 << 16  # bytes of a constant that is no parameter


def save_topology(graph: Path, tower: nn.Module, directory: Path) -> None:
    """Write <name>.onnx, <name>.json and <name>.constants of an exported graph.

    Args:
        tower: whose parameters the graph holds, in float32.

    Raises:
        ValueError: a large constant is no parameter of the tower.
    """
    import onnx

    known = _contents(tower)
    pieces: list[dict[str, Any]] = []
    constants = bytearray()
    model = onnx.load(graph, load_external_data=False)
    with graph.with_name(f"{graph.name}.data").open("rb") as data:
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            where = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = int(where.get("offset", 0)), int(where["length"])
            data.seek(offset)
            content = data.read(length)
            source = known.get(hashlib.sha256(content).hexdigest())
            if source is not None:
                pieces.append({"name": tensor.name, "offset": offset, "length": length, **source})
            elif length <= MOST_CARRIED:
                pieces.append({"name": tensor.name, "offset": offset, "length": length, "constant": len(constants)})
                constants += content
            else:
                raise ValueError(f"{graph}: {tensor.name}, {length} bytes, is no parameter of the tower")
    shutil.copyfile(graph, directory / graph.name)
    (directory / f"{graph.stem}.json").write_text(json.dumps(pieces), "utf-8")
    (directory / f"{graph.stem}.constants").write_bytes(constants)


def fill_topology(topology: Path, tower: nn.Module, graph: Path) -> None:
    """Write a graph with a tower's weights.

    Args:
        topology: <name>.onnx of `save_topology`, with its two files beside it.
        tower: with the same configuration, in float32 on the CPU.
        graph: to write; it keeps the topology's name, which it names its data by.
    """
    pieces = json.loads(topology.with_suffix(".json").read_text("utf-8"))
    constants = topology.with_suffix(".constants").read_bytes()
    values = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}
    with graph.with_name(f"{graph.name}.data").open("wb") as data:
        for piece in pieces:
            data.seek(piece["offset"])
            length = piece["length"]
            if "constant" in piece:
                data.write(constants[piece["constant"] : piece["constant"] + length])
                continue
            array = values[piece["parameter"]].detach().permute(piece["axes"]).contiguous().numpy()
            if array.nbytes != length:
                raise ValueError(f"{piece['parameter']} has {array.nbytes} bytes, the graph's {piece['name']} {length}")
            array.tofile(data)
    shutil.copyfile(topology, graph)


def _contents(tower: nn.Module) -> dict[str, dict[str, Any]]:
    """By the sha256 of its bytes: every parameter and buffer with its axes in every order."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in itertools.chain(tower.named_parameters(), tower.named_buffers()):
        array: np.ndarray = value.detach().numpy()
        for axes in itertools.permutations(range(array.ndim)):
            content = np.ascontiguousarray(array.transpose(axes))
            found.setdefault(hashlib.sha256(content.tobytes()).hexdigest(), {"parameter": name, "axes": axes})
    return found
