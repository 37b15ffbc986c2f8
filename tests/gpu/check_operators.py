"""Check and time the CUDA operators on a GPU.

    python tests/gpu/check_operators.py --library libjinaclip_cuda.so --output results.jsonl

Needs numpy, onnx and onnxruntime-gpu; with torch, products are timed beside torch's. Every operator runs in an ONNX
Runtime session on the CUDA provider and is compared with the numpy reference: odd widths, NaN in a row, and the shapes
of the model (32 images, 4096 tokens in texts of several lengths, one text of 32). Then it is timed: several nodes of it
in one captured graph, between two CUDA events. In processes of their own, what one text takes is timed with
JINACLIP_CUDA_PDL=0 and 1, and attention is checked with JINACLIP_CUDA_WARPGROUPS=0, as GPUs other than Hopper run it. A
line is printed for each result, and written to --output as JSON. The exit status is 1 if anything failed. With --host,
the host build is checked on the CPU provider, without times.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from tests.gpu.operator_cases import (
    EPSILON,
    TEXT_PRODUCTS,
    Case,
    gain_and_bias,
    model_cases,
    normal,
    product_cases,
    short_cases,
    small_cases,
)

try:
    import torch  # first: ONNX Runtime finds CUDA's libraries where torch has loaded them
except ImportError:
    torch = None  # type: ignore[assignment]
import onnx
import onnxruntime
from onnx import TensorProto, helper

Array = NDArray[Any]

TYPES: dict[type, int] = {np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT, np.int32: TensorProto.INT32}


class Cuda:
    """The CUDA runtime's streams and events."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcudart.so.13")
        self.stream = self.create("cudaStreamCreate")

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} failed with error {status}")

    def create(self, name: str) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle))
        return handle

    def milliseconds(self, work: Callable[[], None]) -> float:
        """Device time of what `work` queues on the stream."""
        begin, end = self.create("cudaEventCreate"), self.create("cudaEventCreate")
        self.call("cudaEventRecord", begin, self.stream)
        work()
        self.call("cudaEventRecord", end, self.stream)
        self.call("cudaEventSynchronize", end)
        elapsed = ctypes.c_float()
        self.call("cudaEventElapsedTime", ctypes.byref(elapsed), begin, end)
        for event in (begin, end):
            self.call("cudaEventDestroy", event)
        return elapsed.value


class Runner:
    """Sessions with one operator, or several nodes of it."""

    def __init__(self, library: Path, host: bool) -> None:
        self.library = str(library)
        self.device = "cpu" if host else "cuda"
        self.cuda = None if host else Cuda()

    def session(self, model: onnx.ModelProto, graph: bool = False) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(self.library)
        # identical nodes would become one
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "0" if self.cuda is None else "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.cuda is not None:
            settings = {"user_compute_stream": str(self.cuda.stream.value), "enable_cuda_graph": "1" if graph else "0"}
            providers = [("CUDAExecutionProvider", settings)]
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)

    def value(self, array: Array) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def empty(self, shape: tuple[int, ...], kind: type) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind, self.device, 0)

    def run(self, case: Case) -> list[Array]:
        session = self.session(one_operator(case, 1))
        binding = session.io_binding()
        for index in range(len(case.inputs)):
            binding.bind_ortvalue_input(f"input_{index}", self.value(case.repeated(index)))
        outputs = [self.empty(case.output_shape(i), kind) for i, (_, kind) in enumerate(case.outputs)]
        for index, output in enumerate(outputs):
            binding.bind_ortvalue_output(f"output_0_{index}", output)
        session.run_with_iobinding(binding)
        return [output.numpy() for output in outputs]

    def microseconds(self, case: Case, repeats: int = 50) -> float:
        """Mean device time of one node: nodes of a captured graph, replayed."""
        assert self.cuda is not None
        nodes = 4 if case.moved_bytes() > 2e8 else 16
        session = self.session(one_operator(case, nodes), graph=True)
        binding = session.io_binding()
        kept = [self.value(case.repeated(index)) for index in range(len(case.inputs))]
        for index, value in enumerate(kept):
            binding.bind_ortvalue_input(f"input_{index}", value)
        for node in range(nodes):
            for index, (_, kind) in enumerate(case.outputs):
                kept.append(self.empty(case.output_shape(index), kind))
                binding.bind_ortvalue_output(f"output_{node}_{index}", kept[-1])
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        for _ in range(4):  # two plain runs, the capture, a replay
            session.run_with_iobinding(binding, options)
        runs = max(3, repeats // nodes)

        def replay() -> None:
            for _ in range(runs):
                session.run_with_iobinding(binding, options)

        return self.cuda.milliseconds(replay) * 1e3 / (runs * nodes)


def one_operator(case: Case, nodes: int) -> onnx.ModelProto:
    names = [f"input_{index}" for index in range(len(case.inputs))]
    outputs = [[f"output_{node}_{index}" for index in range(len(case.outputs))] for node in range(nodes)]
    unused = [[f"unused_{node}_{index}" for index in range(case.unused)] for node in range(nodes)]
    return model_of(
        [
            helper.make_node(case.operator, names, results + others, domain="jinaclip", **case.attributes)
            for results, others in zip(outputs, unused, strict=True)
        ],
        {name: x.dtype.type for name, x in zip(names, case.inputs, strict=True)},
        {name: case.outputs[index][1] for results in outputs for index, name in enumerate(results)},
        {name: x.ndim for name, x in zip(names, case.inputs, strict=True)},
    )


def model_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, type], outputs: dict[str, type], ranks: dict[str, int]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "operators",
        [helper.make_tensor_value_info(name, TYPES[kind], [None] * ranks[name]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, TYPES[kind], None) for name, kind in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("jinaclip", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model


def excess(actual: Array, expected: Array, error: Array | float) -> float:
    """How far the worst value lies outside half a unit in the last place plus `error`; at most 0 if all are right."""
    limits = np.finfo(actual.dtype)
    exponent = np.where(expected == 0, limits.minexp, np.frexp(expected)[1] - 1)
    half_unit = np.exp2(np.maximum(exponent, limits.minexp) - limits.nmant - 1.0)
    difference = np.abs(actual.astype(np.float64) - expected) - half_unit - error
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=-np.inf))


def check_case(runner: Runner, case: Case) -> dict[str, Any]:
    """The first repeat against the reference, the others against the first."""
    worst = -np.inf
    for actual, expected in zip(runner.run(case), case.reference(), strict=True):
        parts = actual.reshape(case.repeats, *expected.shape)
        worst = max(worst, excess(parts[0], expected, case.error(expected)))
        for part in parts[1:]:
            if np.array_equal(part, parts[0]):
                continue
            if case.exact_repeats:
                raise AssertionError("equal rows have different results")
            worst = max(worst, excess(part[::16], expected[::16], case.error(expected[::16])))
    if worst > 0:
        raise AssertionError(f"outside the tolerance by {worst:.3g}")
    return {"margin": -worst}


def check_nan(runner: Runner, case: Case) -> dict[str, Any]:
    """NaN in row 7 of the first input changes row 7 alone."""
    before = runner.run(case)
    x = case.inputs[0].copy()
    rows = x.reshape(-1, x.shape[-1])
    rows[7, 3] = np.nan
    after = runner.run(Case(**{**case.__dict__, "inputs": [x, *case.inputs[1:]]}))
    if not any(np.isnan(part.reshape(len(rows), -1)[7]).any() for part in after):
        raise AssertionError("NaN disappeared")
    others = np.arange(len(rows)) != 7
    for part, whole in zip(after, before, strict=True):
        if not np.array_equal(part.reshape(len(rows), -1)[others], whole.reshape(len(rows), -1)[others]):
            raise AssertionError("NaN in a row changed another one")
    return {}


def check_graph(runner: Runner) -> dict[str, Any]:
    """A chain in a captured graph, replayed with new inputs, against a session that is not captured."""
    rng = np.random.default_rng(0)
    rows, width = 300, 1024
    gain, bias = gain_and_bias(rng, width)
    angles = rng.uniform(0, 7, (rows, 32))
    constants: dict[str, Array] = {
        "gain": gain,
        "bias": bias,
        "qkv_weight": (normal(rng, width, 3 * width) / np.float16(32)),
        "qkv_bias": normal(rng, 3 * width),
        "out_weight": (normal(rng, width, width) / np.float16(32)),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }

    def node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
        made: onnx.NodeProto = helper.make_node(operator, inputs, outputs, domain="jinaclip", **attributes)
        return made

    model = model_of(
        [
            node("LayerNorm", ["x", "gain", "bias"], ["normed"], epsilon=EPSILON),
            node("Linear", ["normed", "qkv_weight", "qkv_bias"], ["qkv"]),
            node("SplitRotary", ["qkv", "cos", "sin"], ["q", "k", "v"], num_heads=16, interleaved=0),
            node("RotaryAttention", ["qkv", "cos", "sin"], ["attended", "keys"], num_heads=16, interleaved=0),
            node("Gelu", ["attended"], ["activated"]),
            node("Linear", ["activated", "out_weight"], ["delta"]),
            node("AddLayerNorm", ["x", "delta", "gain", "bias"], ["s", "y"], epsilon=EPSILON, keep_norm=0),
            node("L2Normalize", ["s"], ["unit"]),
        ],
        {"x": np.float32},
        {"y": np.float16, "unit": np.float32, "k": np.float16, "v": np.float16},
        {"x": 2},
    )
    model.graph.initializer.extend([onnx.numpy_helper.from_array(value, name) for name, value in constants.items()])
    shapes = {"y": np.float16, "unit": np.float32, "k": np.float16, "v": np.float16}
    sessions = [runner.session(model), runner.session(model, graph=True)]
    x = runner.value(rng.standard_normal((rows, width), np.float32))
    bound = []
    for session in sessions:
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        outputs = {name: runner.empty((rows, width), kind) for name, kind in shapes.items()}
        for name, output in outputs.items():
            binding.bind_ortvalue_output(name, output)
        bound.append((session, binding, outputs))
    for replay in range(8):
        x.update_inplace(rng.standard_normal((rows, width), np.float32))
        answers = []
        for session, binding, outputs in bound:
            session.run_with_iobinding(binding)
            answers.append({name: output.numpy() for name, output in outputs.items()})
        for name in shapes:
            if not np.array_equal(answers[0][name], answers[1][name]):
                raise AssertionError(f"run {replay}: {name} of the captured graph differs")
    return {"runs": 8}


def node_of(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    made: onnx.NodeProto = helper.make_node(operator, inputs, outputs, domain="jinaclip", **attributes)
    return made


class TextBlocks:
    """Blocks of a text tower, each with weights of its own, for one text."""

    def __init__(self, runner: Runner, blocks: int, rows: int = 32) -> None:
        self.runner, self.rows = runner, rows
        rng = np.random.default_rng(blocks)
        angles = rng.uniform(0, 7, (rows, 32))
        gain, bias = gain_and_bias(rng, 1024)
        arrays: dict[str, Array] = {
            "gain": gain,
            "bias": bias,
            "cos": np.cos(angles).astype(np.float32),
            "sin": np.sin(angles).astype(np.float32),
            "positions": np.arange(rows, dtype=np.int32),
            "offsets": np.array([0, rows], np.int32),
            "token_offset": np.zeros((1, rows), np.int32),
        }
        for name, (k, n) in TEXT_PRODUCTS.items():
            arrays[f"{name}_bias"] = normal(rng, n)
            weight = normal(rng, k, n) / np.float16(k**0.5)
            arrays |= {f"{name}_weight_{block}": np.roll(weight, block * 64, 1) for block in range(blocks)}
        self.kinds = {name: array.dtype.type for name, array in arrays.items()} | {"stream_0": np.float16}
        self.ranks = {name: array.ndim for name, array in arrays.items()} | {"stream_0": 2}
        self.values = {name: runner.value(array) for name, array in arrays.items()}
        self.values["stream_0"] = runner.value(normal(rng, rows, 1024))
        self.nodes = [node for block in range(blocks) for node in self.block(block)]
        self.last = f"stream_{blocks}"
        self.sessions: list[onnxruntime.InferenceSession] = []

    def block(self, block: int) -> list[onnx.NodeProto]:
        def linear(x: str, name: str) -> onnx.NodeProto:
            return node_of("Linear", [x, f"{name}_weight_{block}", f"{name}_bias"], [f"{name}_{block}"])

        inputs = [f"qkv_{block}", "cos", "sin", "positions", "offsets", "token_offset"]
        attended = [f"attended_{block}", f"keys_{block}"]
        return [
            linear(f"stream_{block}", "qkv"),
            node_of("RotaryAttention", inputs, attended, num_heads=16, interleaved=0),
            linear(attended[0], "out"),
            node_of(
                "AddPostNorm",
                [f"stream_{block}", f"out_{block}", "gain", "bias"],
                [f"middle_{block}"],
                epsilon=EPSILON,
            ),
            linear(f"middle_{block}", "fc1"),
            node_of("Gelu", [f"fc1_{block}"], [f"gelu_{block}"]),
            linear(f"gelu_{block}", "fc2"),
            node_of(
                "AddPostNorm",
                [f"middle_{block}", f"fc2_{block}", "gain", "bias"],
                [f"stream_{block + 1}"],
                epsilon=EPSILON,
            ),
        ]

    def bound(self) -> tuple[onnxruntime.InferenceSession, onnxruntime.IOBinding, onnxruntime.OrtValue]:
        """All nodes as one captured graph."""
        model = model_of(self.nodes, self.kinds, {self.last: np.float16}, self.ranks)
        session = self.runner.session(model, graph=True)
        binding = session.io_binding()
        for name, value in self.values.items():
            binding.bind_ortvalue_input(name, value)
        output = self.runner.empty((self.rows, 1024), np.float16)
        binding.bind_ortvalue_output(self.last, output)
        return session, binding, output

    def session_of(self, node: onnx.NodeProto) -> onnxruntime.InferenceSession:
        return self.runner.session(
            model_of(
                [node],
                {name: self.kinds.get(name, np.float16) for name in node.input},
                dict.fromkeys(node.output, np.float16),
                {name: self.ranks.get(name, 2) for name in node.input},
            )
        )

    def one_by_one(self) -> Array:
        """Each node in a session of its own, with nothing else on the device."""
        self.sessions = self.sessions or [self.session_of(node) for node in self.nodes]
        values = dict(self.values)
        for node, session in zip(self.nodes, self.sessions, strict=True):
            binding = session.io_binding()
            for name in node.input:
                binding.bind_ortvalue_input(name, values[name])
            for name in node.output:
                binding.bind_output(name, self.runner.device, 0)
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            values |= dict(zip(node.output, binding.get_outputs(), strict=True))
        result: Array = values[self.last].numpy()
        return result


def check_overlap(runner: Runner) -> dict[str, Any]:
    """Kernels that are launched before the one in front ends compute what they do alone."""
    rng = np.random.default_rng(1)
    for rows in (32, 300):  # with 300 tokens, attention is three launches
        chain = TextBlocks(runner, 2, rows)
        session, binding, output = chain.bound()
        for run in range(5):
            chain.values["stream_0"].update_inplace(normal(rng, rows, 1024))
            for _ in range(20):
                session.run_with_iobinding(binding)
            if not np.array_equal(output.numpy(), chain.one_by_one()):
                raise AssertionError(f"{rows} tokens, run {run}: the captured graph differs from its nodes one by one")
    return {"runs": 5}


def measure_chain(runner: Runner) -> dict[str, Any]:
    """A text's 24 blocks in a captured graph: weights are read from memory, not from the cache."""
    assert runner.cuda is not None
    session, binding, _ = TextBlocks(runner, 24).bound()
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def replay() -> None:
        for _ in range(20):
            session.run_with_iobinding(binding, options)

    for _ in range(4):
        session.run_with_iobinding(binding, options)
    return {"us": round(runner.cuda.milliseconds(replay) * 1e3 / 20, 1)}


def torch_microseconds(case: Case, repeats: int = 20) -> float | None:
    """torch.addmm of the same shape (bias in cublasLt's epilogue), or None without torch."""
    if torch is None or not torch.cuda.is_available():
        return None
    x = torch.from_numpy(case.repeated(0)).cuda()
    weight, bias = torch.from_numpy(case.inputs[1]).cuda(), torch.from_numpy(case.inputs[2]).cuda()
    graph = torch.cuda.CUDAGraph()
    for _ in range(2):
        torch.addmm(bias, x, weight)
    with torch.cuda.graph(graph):
        for _ in range(4):
            torch.addmm(bias, x, weight)
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(repeats // 4):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / (repeats // 4 * 4)


def measure(runner: Runner, case: Case, beside: bool = True) -> dict[str, Any]:
    microseconds = runner.microseconds(case)
    result = {"us": round(microseconds, 2), "gb_s": round(case.moved_bytes() / microseconds / 1e3, 1)}
    if case.flops:
        result["tflop_s"] = round(case.flops / microseconds / 1e6, 1)
        other = torch_microseconds(case) if beside and case.operator == "Linear" else None
        if other is not None:
            result["torch_us"] = round(other, 2)
            result["torch_tflop_s"] = round(case.flops / other / 1e6, 1)
    return result


class Report:
    def __init__(self, output: Path | None, seconds: float) -> None:
        self.file = output.open("w", encoding="utf-8") if output is not None else None
        self.deadline = time.monotonic() + seconds
        self.passed = self.failed = self.skipped = 0

    def record(self, check: str, name: str, work: Callable[[], dict[str, Any]], quiet: bool = False) -> None:
        """Run one check; what it throws is reported and hides no other check."""
        began = time.monotonic()
        entry: dict[str, Any] = {"check": check, "name": name}
        if began > self.deadline:
            self.skipped += 1
            entry["status"] = "skipped: out of time"
        else:
            try:
                entry |= {"status": "ok", **work()}
                self.passed += 1
            except Exception as error:
                self.failed += 1
                entry |= {"status": f"FAILED: {type(error).__name__}: {str(error)[:300]}"}
                if not isinstance(error, AssertionError):
                    traceback.print_exc()
        entry["seconds"] = round(time.monotonic() - began, 2)
        if self.file is not None:
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
        if not quiet or entry["status"] != "ok":
            facts = " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items())
            print(facts, flush=True)

    def end(self) -> int:
        """Print the counts and return the exit status."""
        print(f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped", flush=True)
        return 1 if self.failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=os.environ.get("JINACLIP_CUDA_OPERATORS"))
    parser.add_argument("--output", type=Path, help="file of JSON lines")
    parser.add_argument("--seconds", type=float, default=60, help="start no check after this")
    parser.add_argument("--short", action="store_true", help="time what one text runs, nothing else")
    parser.add_argument("--attention", action="store_true", help="check RotaryAttention's small shapes, nothing else")
    parser.add_argument("--small", action="store_true", help="check small shapes without NaN and a graph, nothing else")
    parser.add_argument("--host", action="store_true", help="check the host build on the CPU provider")
    args = parser.parse_args()
    if args.library is None:
        parser.error("--library or $JINACLIP_CUDA_OPERATORS is needed")
    faulthandler.dump_traceback_later(args.seconds + 20, exit=True)
    report = Report(args.output, args.seconds)
    runner = Runner(args.library.resolve(), args.host)
    if args.short:
        return time_short(report, runner)
    if args.attention:
        return check_attention(report, runner)
    small = small_cases()
    for case in small:
        name = f"{case.operator} {case.title}"
        report.record("right", name, lambda case=case: check_case(runner, case), quiet=True)  # type: ignore[misc]
    print(f"small shapes: {report.passed} passed, {report.failed} failed", flush=True)
    if args.small:
        report.record("graph", "chain", lambda: check_graph(runner))
        return report.end()
    for case in small:
        mixes_rows = case.operator in ("MeanPool", "RotaryAttention")
        if 0 in case.row_inputs and not mixes_rows and case.inputs[0].shape[-2] == 33:
            name = f"{case.operator} {case.title}"
            report.record("nan", name, lambda case=case: check_nan(runner, case), quiet=True)  # type: ignore[misc]
    print(f"and with NaN in a row: {report.passed} passed, {report.failed} failed", flush=True)
    if not args.host:
        report.record("graph", "chain", lambda: check_graph(runner))
        report.record("overlap", "two blocks of a text", lambda: check_overlap(runner))
        for early in "01":
            name = f"JINACLIP_CUDA_PDL={early}"
            report.record("short", name, lambda name=name: in_a_process(args, "--short", name))  # type: ignore[misc]
        name = "JINACLIP_CUDA_WARPGROUPS=0"
        report.record("right", name, lambda: in_a_process(args, "--attention", name))
    for case in [*model_cases(), *product_cases()] if not args.host else []:
        name = f"{case.operator} {case.title}"
        report.record("right", name, lambda case=case: check_case(runner, case), quiet=True)  # type: ignore[misc]
        report.record("time", name, lambda case=case: measure(runner, case))  # type: ignore[misc]
    return report.end()


def time_short(report: Report, runner: Runner) -> int:
    early = f"PDL {os.environ.get('JINACLIP_CUDA_PDL', 'default')}"
    report.record("overlap", f"two blocks of a text, {early}", lambda: check_overlap(runner))
    for case in short_cases():
        name = f"{case.operator} {case.title}, {early}"
        report.record("time", name, lambda case=case: measure(runner, case, beside=False))  # type: ignore[misc]
    report.record("time", f"24 blocks of a text, {early}", lambda: measure_chain(runner))
    return 1 if report.failed else 0


def check_attention(report: Report, runner: Runner) -> int:
    for case in (case for case in small_cases() if case.operator == "RotaryAttention"):
        name = f"{case.operator} {case.title}"
        report.record("right", name, lambda case=case: check_case(runner, case), quiet=True)  # type: ignore[misc]
    return 1 if report.failed else 0


def in_a_process(args: argparse.Namespace, what: str, setting: str) -> dict[str, Any]:
    """--short or --attention with an environment variable that the library reads once, NAME=VALUE. The results go to a
    file beside --output.
    """
    variable, value = setting.split("=")
    words = [sys.executable, __file__, what, "--library", str(args.library), "--seconds", "25"]
    if args.output is not None:
        words += [
            "--output",
            str(args.output.with_suffix(f".{variable.rpartition('_')[2]}{value}{args.output.suffix}")),
        ]
    done = subprocess.run(words, env=os.environ | {variable: value}, timeout=40)
    if done.returncode != 0:
        raise AssertionError(f"exit status {done.returncode}")
    return {}


if __name__ == "__main__":
    sys.exit(main())
