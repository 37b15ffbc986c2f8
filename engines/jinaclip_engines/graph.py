"""Helpers for the passes: read and write graphs, match nodes, find linear layers, insert nodes.

A pass takes an `onnx_ir.Model` of one tower and its number of attention heads, modifies the model in place and returns
the number of changes. Weights are read from disk on first access.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from onnx_ir.tape import Tape

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
JINACLIP = "jinaclip"  # the project's own operators
PATCHES = "patch_embed"  # the image tower's linear layer before its blocks
HALF, FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
Pass = Callable[[ir.Model, int], int]


def read(path: Path) -> ir.Model:
    """Read a graph. Its weights are memory-mapped from the data file in the same directory."""
    return ir.load(path)


def write(model: ir.Model, path: Path) -> None:
    """Write a graph without unused nodes and weights, with its weights in `<path>.data`, and check it.

    `path` must not be the file that `model` was read from.
    """
    tidy(model)
    ir.save(model, path, external_data=f"{path.name}.data")
    onnx.checker.check_model(str(path))


def delete(path: Path) -> None:
    """Delete a graph and its weights, if they exist."""
    for file in (path, path.with_name(f"{path.name}.data")):
        file.unlink(missing_ok=True)


def run_passes(model: ir.Model, heads: int, passes: Mapping[str, Pass]) -> dict[str, int]:
    """Run passes in order.

    Args:
        model: a graph of one tower; modified in place.
        heads: attention heads of the tower.
        passes: the passes by name.

    Returns:
        The number of changes by pass.

    Raises:
        PassError: the graph does not have the structure that a pass expects.
    """
    counts = {}
    for name, step in passes.items():
        counts[name] = step(model, heads)
        tidy(model)
    forget_shapes(model)
    return counts


def tidy(model: ir.Model) -> None:
    """Remove unused nodes and opsets, and name new nodes and values."""
    for step in (RemoveUnusedNodesPass(), RemoveUnusedOpsetsPass(), NameFixPass()):
        step(model)


def forget_shapes(model: ir.Model) -> None:
    """Remove the recorded shapes and types of values inside the graph, after passes that change them."""
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = value.type = None


def signature(model: ir.Model) -> str:
    """Hash of a graph's structure without the contents of its weights: 16 hex digits."""
    lines = [f"{value.name} {value.type} {value.shape}" for value in (*model.graph.inputs, *model.graph.outputs)]
    lines += [f"{name} {value.type} {value.shape}" for name, value in sorted(model.graph.initializers.items())]
    for node in model.graph:
        names = [value.name if value is not None else "" for value in (*node.inputs, *node.outputs)]
        settings = sorted((name, str(value)) for name, value in attributes(node).items())
        lines.append(f"{node.domain}.{node.op_type} {names} {settings}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def array(value: ir.Value | None) -> np.ndarray | None:
    """The contents of an initializer, or None if `value` is computed."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return value.const_value.numpy()


def constant(value: ir.Value | None) -> np.ndarray:
    """The contents of a value that must be an initializer."""
    found = array(value)
    assert found is not None, f"{value} is computed, expected an initializer"
    return found


@dataclass(frozen=True)
class Linear:
    """y = x W + b: a MatMul with constant weights [in, out], and the Add of its bias [out] if it has one.

    Attributes:
        matmul: the MatMul node.
        add: the Add node of the bias, or None.
        name: name of the layer in the tower, for example "blocks.3.fc1".
        cast: for a float16 product, the Cast to float32 between MatMul and Add.
    """

    matmul: ir.Node
    add: ir.Node | None
    name: str
    cast: ir.Node | None = None

    @property
    def block(self) -> str:
        """Name of the layer's block, for example "blocks.3"."""
        return self.name.rpartition(".")[0]

    @property
    def x(self) -> ir.Value:
        value = self.matmul.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> ir.Value:
        value = self.matmul.inputs[1]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        if self.add is None:
            return None
        return next(v for v in self.add.inputs if v is not None and array(v) is not None)

    def bias_values(self) -> np.ndarray:
        """The contents of the bias, or zeros, [out]."""
        return np.zeros(shape_of(self.weight)[1], np.float32) if self.bias is None else constant(self.bias)

    @property
    def y(self) -> ir.Value:
        return (self.add or self.cast or self.matmul).outputs[0]


def linears(model: ir.Model) -> list[Linear]:
    """Every linear layer of the blocks, in order of execution."""
    return [layer for layer in _layers(model) if layer.name != PATCHES]


def patch_product(model: ir.Model) -> Linear | None:
    """The image tower's patch embedding, a linear layer before its blocks; None for text."""
    return next((layer for layer in _layers(model) if layer.name == PATCHES), None)


def _layers(model: ir.Model) -> list[Linear]:
    found = []
    block = ""
    for node in model.graph:
        if node.op_type == "MatMul" and not node.domain and len(shape_of(node.inputs[1])) == 2:
            if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                continue  # replaced by a pass
            half = node.inputs[1].dtype == HALF  # type: ignore[union-attr]
            cast = only_user(node.outputs[0], "Cast") if half else None
            add = only_user((cast or node).outputs[0], "Add")
            bias = next((v for v in add.inputs if array(v) is not None), None) if add is not None else None
            if bias is None:  # the image tower's key projection has no bias to take the name from
                found.append(Linear(node, None, f"{block}.k", cast))
                continue
            found.append(Linear(node, add, (bias.name or "").removeprefix("tower.").removesuffix(".bias"), cast))
            block = found[-1].block
    return found


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    """Shape of an initializer; () for anything else."""
    if value is None or value.const_value is None or value.producer() is not None:
        return ()
    return tuple(value.const_value.shape.numpy())


def nodes(model: ir.Model, op_type: str, domain: str = "") -> list[ir.Node]:
    """The nodes of one operator, in order of execution."""
    return [node for node in model.graph if node.op_type == op_type and node.domain == domain]


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes `value`, if it is of this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def producers(value: ir.Value | None, *op_types: str) -> tuple[ir.Node, ...]:
    """The node that computes `value`, the node that computes its first input, and so on; () if one of them has another
    operator than `op_types` says.
    """
    found: list[ir.Node] = []
    for op_type in op_types:
        node = producer(value, op_type)
        if node is None:
            return ()
        found.append(node)
        value = node.inputs[0]
    return tuple(found)


def through_casts(value: ir.Value | None) -> ir.Value | None:
    """The source of `value` before any casts."""
    while (cast := producer(value, "Cast")) is not None:
        value = cast.inputs[0]
    return value


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The only node that reads `value`, if there is exactly one and it is of this operator."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and users[0].node.op_type == op_type else None


def only_users(value: ir.Value, *op_types: str) -> tuple[ir.Node, ...]:
    """The only node that reads `value`, the only node that reads its first output, and so on; () if there is no such
    node or it has another operator than `op_types` says.
    """
    found: list[ir.Node] = []
    for op_type in op_types:
        node = only_user(value, op_type)
        if node is None:
            return ()
        found.append(node)
        value = node.outputs[0]
    return tuple(found)


class Ops:
    """Context manager that creates nodes. When the `with` block ends, they are inserted in order before a node.

    with Ops(model, before=node) as op:
        y = op("Mul", [x, op.const(scale)])
        op.replace(node.outputs[0], y)
    """

    def __init__(self, model: ir.Model, *, before: ir.Node) -> None:
        self._model, self._before = model, before
        self._tape = Tape()
        self._replaced: list[tuple[ir.Value, ir.Value]] = []

    def __enter__(self) -> Ops:
        return self

    def __call__(
        self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node with one output."""
        return self._tape.op(op_type, inputs, attributes or None, domain=domain)

    def several(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs."""
        return self._tape.op_multi_out(op_type, inputs, attributes or None, num_outputs=outputs, domain=domain)

    def const(self, values: np.ndarray | np.generic, name: str | None = None) -> ir.Value:
        """Add an initializer."""
        return initializer(self._model, np.asarray(values), name)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Make every reader of `old` read `new`, when the `with` block ends."""
        self._replaced.append((old, new))

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        graph = self._model.graph
        graph.insert_before(self._before, list(self._tape.nodes))
        for domain in {node.domain for node in self._tape.nodes if node.domain}:
            graph.opset_imports.setdefault(domain, 1)
        for old, new in self._replaced:
            if old.is_graph_output():  # name and type are part of the graph's interface
                new.name, new.type, new.shape = old.name, old.type, old.shape
                old.name = None
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def initializer(model: ir.Model, values: np.ndarray, name: str | None = None) -> ir.Value:
    """Add a constant to the graph. A number is appended to the name if it is already used."""
    taken = model.graph.initializers
    base = name or "constant"
    number = len(taken)
    while (full := base if name and base not in taken else f"{base}_{number}") in taken:
        number += 1
    value = ir.Value(name=full, shape=ir.Shape(values.shape), type=ir.TensorType(ir.DataType.from_numpy(values.dtype)))
    # ascontiguousarray turns a scalar into a vector; reshape restores the shape.
    value.const_value = ir.tensor(np.ascontiguousarray(values).reshape(values.shape), name=full)
    model.graph.register_initializer(value)
    return value


def attributes(node: ir.Node) -> Mapping[str, Any]:
    """A node's attributes as Python values."""
    return {name: attribute.value for name, attribute in node.attributes.items() if isinstance(attribute, ir.Attr)}
