"""Planning of runs on a GPU: the shape that a batch is padded to, and the layout of its arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jinaclip.backends.cost import GPU_COST, PACKED_GPU_COST
from jinaclip.backends.cuda.staging import Layout
from jinaclip.backends.onnxruntime import packed_texts
from jinaclip.backends.shapes import Profile, bucket_for, pad_into
from jinaclip.errors import InputError

# Up to this many tokens or images, launching kernels takes about as long as running them. Padding to a shape that has a
# CUDA graph is then faster.
GRAPH_TOKENS, GRAPH_IMAGES = 2048, 4

Key = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """The plan of a run.

    Attributes:
        key: the padded shape, which identifies its CUDA graph.
        small: whether the shape is one of the small ones that batches are padded to.
        inputs, outputs: layout of the input and output arrays.
        rows: number of rows in the batch. The outputs may have more.
        wanted: names of the outputs that are copied back.
        write: function that fills the input arrays.
    """

    key: Key
    small: bool
    inputs: Layout
    outputs: Layout
    rows: int
    wanted: tuple[str, ...]
    write: Callable[[Mapping[str, np.ndarray]], None]

    def copied_back(self) -> tuple[int, int]:
        """The range of bytes in the block of outputs that has the wanted ones: start, and end (exclusive)."""
        parts = [self.outputs.parts[name] for name in self.wanted]
        ends = [offset + self.rows * width * dtype.itemsize for offset, (_, width), dtype in parts]
        return min(offset for offset, _, _ in parts), max(ends)


class RunPlanner:
    """Plans the runs of one graph.

    Args:
        session: the onnxruntime session, from which the graph's inputs and outputs are read.
        pad: token id that fills the rest of a row.

    Attributes:
        input: name of the input that callers pass.
        outputs: width of the rows of each output, by name.
        packed: texts are concatenated without padding.
        cost: cost of a run.
    """

    def __init__(self, session: Any, pad: int) -> None:
        types = {"tensor(uint8)": np.uint8, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
        sources = session.get_inputs()
        self._pad = pad
        self._inputs = {source.name: np.dtype(types.get(source.type, np.float32)) for source in sources}
        self.outputs = {output.name: int(output.shape[1]) for output in session.get_outputs()}
        self.packed = set(self._inputs) == packed_texts.INPUTS
        self.input = packed_texts.IDS if self.packed else sources[0].name
        self.cost = PACKED_GPU_COST if self.packed else GPU_COST
        is_text = len(sources[0].shape) <= 2
        self._input_row = () if is_text else tuple(sources[0].shape[1:])
        self._most = GRAPH_TOKENS if is_text else GRAPH_IMAGES
        most = (1, 1, self._most)
        self._buckets = (Profile("graphs", most, most if is_text else None),)
        self._largest = 0  # tokens of the largest packed run so far

    def checked(self, batch: np.ndarray) -> np.ndarray:
        """The batch as an array. Raises InputError if its shape or dtype does not match the graph's input."""
        batch, wanted, row = np.asarray(batch), self._inputs[self.input], self._input_row
        if (batch.shape[1:] != row) if row else (batch.ndim != 2):
            expected = ", ".join(map(str, row)) if row else "T"
            raise InputError(f"{self.input} has shape {list(batch.shape)}, expected [B, {expected}]")
        if batch.dtype != wanted and not (wanted.kind == batch.dtype.kind == "i"):
            raise InputError(f"{self.input} is {batch.dtype}, expected {wanted}")
        return batch

    def plan(self, batch: np.ndarray, wanted: tuple[str, ...]) -> Run:
        """Plan the run of a batch.

        Args:
            batch: the batch, as `checked` returns it.
            wanted: names of the outputs to copy back.
        """
        if self.packed:
            texts = packed_texts.Texts(batch, self._pad)
            shape = packed_texts.shape_of(texts.lengths, self._largest)
            self._largest = max(self._largest, shape[0])
            small = packed_texts.is_small(shape, GRAPH_TOKENS)
            inputs, outputs = self._inputs_of(packed_texts.input_shapes(shape)), self._outputs_of(shape[1])
            return Run(shape, small, inputs, outputs, len(batch), wanted, texts.write)
        bucket = bucket_for(len(batch), batch.shape[1] if batch.ndim == 2 else None, self._buckets)
        small = bucket is not None and bucket.rows * (bucket.tokens or 1) <= self._most
        key: Key = batch.shape
        if bucket is not None and small:
            key = (bucket.rows, *((bucket.tokens,) if bucket.tokens else batch.shape[1:]))

        def write(views: Mapping[str, np.ndarray]) -> None:
            pad_into(views[self.input], batch, self._pad)

        inputs, outputs = self._inputs_of({self.input: key}), self._outputs_of(key[0])
        return Run(key, small, inputs, outputs, len(batch), wanted, write)

    def _inputs_of(self, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        arrays = {name: (shape, self._inputs[name]) for name, shape in shapes.items()}
        return Layout(arrays, unset=packed_texts.TOKEN_OFFSET)

    def _outputs_of(self, rows: int) -> Layout:
        return Layout({name: ((rows, width), np.dtype(np.float32)) for name, width in self.outputs.items()})
