"""TensorRT-RTX compiles our graphs ahead of time, without a GPU: what it makes of them, and what we refuse.

Each trap of its parser and compiler is set on purpose, and the build must fail and name the layer. Compiled is not run:
numbers and speed are tested on a GPU (tests/gpu).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from jinaclip.backends.cuda.gpu import driver_problem
from jinaclip.backends.onnxruntime.library import import_onnxruntime, session_options
from jinaclip.backends.shapes import Profile
from jinaclip.backends.tensorrt.library import Library, Messages, load_library, logger_of
from jinaclip.cli import main
from jinaclip_engines.errors import BuildError
from jinaclip_engines.graph import FULL, HALF, Ops, nodes, only_user, producer, read, shape_of, write
from jinaclip_engines.passes import tensorrt as passes
from jinaclip_engines.passes.tensorrt import Expected, for_tensorrt
from jinaclip_engines.tensorrt.build_report import Kernel, Operand, _sums_of_products, read_kernels, report_on
from jinaclip_engines.tensorrt.compiler import (
    Compiled,
    _configure,
    _load_timing_cache,
    _save_timing_cache,
    compile_plan,
    default_targets,
)
from jinaclip_engines.tensorrt.profiles import load_profiles
from jinaclip_export.bundle.manifest import Identity
from jinaclip_export.bundle.writer import export_bundle
from jinaclip_export.checkpoint.reader import Checkpoint
from tests.conftest import MakeCheckpoint
from tests.support.parity import CONFIGURATIONS

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: its packages are for Linux on x86-64")

PAGE = (Path(__file__).parents[2] / "docs/bundle.md").read_text("utf-8")
TARGETS = ("sm80", "sm86", "sm89", "sm120")
TEXT = (Profile("text", (1, 4, 16), (16, 64, 512)),)
IMAGE = (Profile("image", (1, 4, 8)),)
FORMS = pytest.mark.parametrize("operator", [True, False], ids=["one operator", "spelled out"])
Trap = Callable[[ir.Model, Expected], object]


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library("tensorrt-rtx")


def build(
    library: Library, bundle: Path, tower: str, directory: Path, policy: str = "fp16-acc32", *, operator: bool = True,
    trap: Trap = lambda model, expected: None, targets: Sequence[str] = ("sm89",), held_to: str | None = None,
) -> Compiled:  # fmt: skip
    """Rewrite, set a trap, compile, and hold the result to a policy."""
    model = read(bundle / f"{tower}-fp16.onnx")
    expected = for_tensorrt(model, policy, attention_operator=operator)
    trap(model, expected)
    path = directory / "graph.onnx"
    write(model, path)
    profiles = TEXT if tower == "text" else IMAGE
    return compile_plan(library, path, expected, held_to or policy, profiles, targets=targets)


# What is compiled


@FORMS
@pytest.mark.parametrize("tower", ["text", "image"])
def test_two_blocks_of_the_published_width(
    library: Library, wide_bundle: Path, tmp_path: Path, tower: str, operator: bool
) -> None:
    """Four GPU generations: attention in one kernel a block, float16 weights, sums in float32, nothing kept twice."""
    compiled = build(library, wide_bundle, tower, tmp_path, operator=operator, targets=TARGETS)
    report = compiled.report
    assert report.problems == () and (report.attention, report.attention_expected) == (2, 2)
    products = 8 if tower == "text" else 11  # the patches are one
    assert (report.products, report.products_expected, report.summed_in_float32) == (products,) * 3
    assert report.attention_sums == ("FP32",)
    assert report.plan_bytes <= 1.05 * report.weight_bytes + (16 << 20)
    (source,) = compiled.inputs
    assert source["dtype"] == ("int32" if tower == "text" else "uint8")
    assert [output["name"] for output in compiled.outputs] == [
        f"{tower}_embeddings", f"l2norm_{tower}_embeddings", "all_finite"
    ]  # fmt: skip


@FORMS
@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("policy", passes.POLICIES)
def test_every_policy_compiles(
    library: Library, precise_bundle: Path, tmp_path: Path, tower: str, policy: str, operator: bool
) -> None:
    report = build(library, precise_bundle, tower, tmp_path, policy, operator=operator).report
    exact = policy == "fp16-acc32"
    assert report.products == report.products_expected == (12 if tower == "text" else 16)
    assert report.summed_in_float32 == (report.products if exact else 0)
    # The last image block has one query and is spelled out: its sums are in float32 whatever is asked.
    free = ("FP16",) if tower == "text" else ("FP16", "FP32")
    assert report.attention_sums == (("FP32",) if exact or not operator else free)


def test_several_profiles_share_their_weights(library: Library, precise_bundle: Path, tmp_path: Path) -> None:
    """Each has kernels of its own, and each is looked at."""
    for tower in ("text", "image"):
        model = read(precise_bundle / f"{tower}-fp16.onnx")
        expected = for_tensorrt(model, "fp16-acc32")
        path = tmp_path / "graph.onnx"
        write(model, path)
        profiles = load_profiles("server")[tower]
        compiled = compile_plan(library, path, expected, "fp16-acc32", profiles, targets=("sm89",))
        report = compiled.report
        assert (report.profiles, report.attention) == (len(profiles), 3 * len(profiles))
        assert report.summed_in_float32 == report.products_expected
        assert report.plan_bytes < report.weight_bytes + len(profiles) * (16 << 20)
        sums = _sums_of_products(memoryview(compiled.plan))
        assert {profile for _, profile in sums} == set(range(len(profiles)))


def test_a_single_row_is_multiplied_as_the_graph_says(library: Library, precise_bundle: Path, tmp_path: Path) -> None:
    """The last image block of one picture has one row: kernels that multiply and add in float32, on float16 weights."""
    model = read(precise_bundle / "image-fp16.onnx")
    expected = for_tensorrt(model, "fp16-acc32")
    path = tmp_path / "graph.onnx"
    write(model, path)
    profiles = (Profile("one", (1, 1, 1)),)
    compiled = compile_plan(library, path, expected, "fp16-acc32", profiles, targets=("sm89",))
    told = sum(len(kinds) for kinds in _sums_of_products(memoryview(compiled.plan)).values())
    assert told == 12 and compiled.report.summed_in_float32 == 16


def test_blocks_in_float32_compile_beside_the_others(library: Library, precise_bundle: Path, tmp_path: Path) -> None:
    from jinaclip_engines.graph import linears
    from jinaclip_engines.precision.fp16 import to_fp16

    for tower in ("text", "image"):
        model = read(precise_bundle / f"{tower}-fp32.onnx")
        ranges = {value.name or "": np.ones(1, np.float32) for layer in linears(model) for value in (layer.x, layer.y)}
        to_fp16(model, ranges, ("blocks.1",))
        expected = for_tensorrt(model, "fp16-acc32")
        path = tmp_path / "graph.onnx"
        write(model, path)
        profiles = TEXT if tower == "text" else IMAGE
        report = compile_plan(library, path, expected, "fp16-acc32", profiles, targets=("sm89",)).report
        assert (report.attention, report.problems) == (2, ()) and expected.float32_products > 0
        assert report.summed_in_float32 == report.products


def test_other_widths_heads_and_inputs(library: Library, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Heads of 24 and 40, 1 and 4 blocks, patches of 16, and pixels as the published file wants them."""
    _, dim, text, vision = CONFIGURATIONS["odd"]
    bundle = tmp_path / "bundle"
    export_bundle(
        Checkpoint(make_checkpoint(dim, text=text, vision=vision)), bundle, identity=Identity("odd", None, "none"),
        precisions=("fp32", "fp16"), pixels="float32",
    )  # fmt: skip
    for tower, blocks in (("text", 4), ("image", 1)):
        compiled = build(library, bundle, tower, tmp_path)
        assert compiled.report.attention == blocks and compiled.report.problems == ()
        assert compiled.inputs[0]["dtype"] == ("int32" if tower == "text" else "float32")


@pytest.mark.parametrize("target", ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"])
def test_every_generation_that_it_knows(library: Library, precise_bundle: Path, tmp_path: Path, target: str) -> None:
    assert target in default_targets(library)
    for tower in ("text", "image"):
        assert build(library, precise_bundle, tower, tmp_path, targets=(target,)).report.attention == 3


# Traps: each of these compiles, or nearly, and must be refused with the layer's name


def mask_as_lengths(model: ir.Model, expected: Expected) -> None:
    """The number of tokens of each row as opset 24's input 7, which the parser drops without a word."""
    model.graph.opset_imports[""] = 24
    mask = next(v for n in model.graph for v in n.outputs if v.name == expected.mask)
    first = nodes(model, "Attention")[0]
    with Ops(model, before=first) as op:
        keep = op("Cast", [mask], to=ir.DataType.INT64)
        lengths = op("ReduceSum", [keep, op.const(np.array([1, 2, 3]))], keepdims=0)
    for node in nodes(model, "Attention"):
        with Ops(model, before=node) as op:
            y = op("Attention", [*node.inputs[:3], None, None, None, lengths])
            y.producer().name = node.name  # type: ignore[union-attr]
            op.replace(node.outputs[0], y)


def no_mask(model: ir.Model, expected: Expected) -> None:
    nodes(model, "Attention")[1].replace_input_with(3, None)


def additive_mask(model: ir.Model, expected: Expected) -> None:
    """0 and -inf in float32 to be added, as many exporters write it."""
    mask = nodes(model, "Attention")[0].inputs[3]
    with Ops(model, before=nodes(model, "Attention")[0]) as op:
        added = op("Where", [mask, op.const(np.float32(0)), op.const(np.float32(-np.inf))])
    for node in nodes(model, "Attention"):
        node.replace_input_with(3, added)


def bias_before_the_cast(model: ir.Model, expected: Expected) -> None:
    """The bias added to the float32 sums, before they are rounded: the compiler then multiplies in float32."""
    (product,) = (node for node in nodes(model, "MatMul") if node.name == "blocks.1.fc1")
    halved = only_user(product.outputs[0], "Cast")
    widened = halved and only_user(halved.outputs[0], "Cast")
    assert widened is not None
    ir.convenience.replace_all_uses_with(widened.outputs[0], product.outputs[0])


def rounded_after_the_bias(model: ir.Model, expected: Expected) -> None:
    """Rounded to float16, but only after the bias: the same float32 product."""
    (product,) = (node for node in nodes(model, "MatMul") if node.name == "blocks.1.fc1")
    halved = only_user(product.outputs[0], "Cast")
    widened = halved and only_user(halved.outputs[0], "Cast")
    biased = widened and only_user(widened.outputs[0], "Add")
    assert widened is not None and biased is not None
    ir.convenience.replace_all_uses_with(widened.outputs[0], product.outputs[0])
    (reader, index), *_ = biased.outputs[0].uses()
    with Ops(model, before=reader) as op:
        reader.replace_input_with(index, op("Cast", [op("Cast", [biased.outputs[0]], to=HALF)], to=FULL))


def float32_operands(model: ir.Model, expected: Expected) -> None:
    """Queries that were never rounded to float16."""
    node = nodes(model, "Attention")[1]
    widened = producer(node.inputs[0], "Cast")
    halved = producer(widened.inputs[0], "Cast") if widened else None
    assert halved is not None
    node.replace_input_with(0, halved.inputs[0])


def scores_not_rounded(model: ir.Model, expected: Expected) -> None:
    """The softmax handed on in float32, without a cast to float16 and back: a matrix of all scores in memory."""
    (values,) = (node for node in nodes(model, "MatMul") if node.name == "blocks.1.attention.values")
    softmax = nodes(model, "Softmax")[1]
    values.replace_input_with(0, softmax.outputs[0])


def scores_from_float32(model: ir.Model, expected: Expected) -> None:
    """The first product of attention on float32 operands, which seems the careful thing to do."""
    (scores,) = (node for node in nodes(model, "MatMul") if node.name == "blocks.1.attention.scores")
    cast = only_user(scores.outputs[0], "Cast")
    assert cast is not None
    with Ops(model, before=scores) as op:
        wide = op("MatMul", [op("Cast", [value], to=FULL) for value in scores.inputs])
        wide.producer().name = scores.name  # type: ignore[union-attr]
        op.replace(cast.outputs[0], wide)


TRAPS: tuple[tuple[Trap, str, bool, str], ...] = (
    (mask_as_lengths, "text", True, r"blocks\.0\.attention: the parser dropped the mask"),
    (no_mask, "text", True, r"blocks\.1\.attention: the parser dropped the mask"),
    (additive_mask, "text", True, r"blocks\.0\.attention: the mask has type FLOAT, expected BOOL"),
    (bias_before_the_cast, "text", True, r"blocks\.1\.fc1: the weights are Float"),
    (rounded_after_the_bias, "text", True, r"blocks\.1\.fc1: the weights are Float"),
    (float32_operands, "image", True, "cannot compile|cannot parse"),
    (scores_not_rounded, "text", False, r"blocks\.1\.attention: expected one fused attention kernel"),
    (scores_from_float32, "image", False, r"blocks\.1\.attention: expected one fused attention kernel"),
)


@pytest.mark.parametrize(("trap", "tower", "operator", "message"), TRAPS, ids=[t[0].__name__ for t in TRAPS])
def test_a_trap_is_refused(
    library: Library, precise_bundle: Path, tmp_path: Path, trap: Trap, tower: str, operator: bool, message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        build(library, precise_bundle, tower, tmp_path, operator=operator, trap=trap)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_sums_that_were_not_asked_to_be_float32_are_refused(
    library: Library, precise_bundle: Path, tmp_path: Path, tower: str
) -> None:
    """Plain float16 products, as nearly every exporter writes them: fine for fp16-fast, refused for fp16-acc32."""
    with pytest.raises(BuildError, match=r"blocks\.0\.\w+: products are not summed in float32"):
        build(library, precise_bundle, tower, tmp_path, "fp16-fast", held_to="fp16-acc32")


def test_a_plan_that_keeps_weights_twice_is_refused(library: Library, wide_bundle: Path, tmp_path: Path) -> None:
    """The size is a check of its own, for what the list of layers does not show: here of an embedding table."""

    def widen(model: ir.Model, expected: Expected) -> None:
        (table,) = (v for v in model.graph.initializers.values() if shape_of(v)[:1] == (36864,))
        reader = next(iter(table.uses())).node
        with Ops(model, before=reader) as op:
            wide = op.const(table.const_value.numpy().astype(np.float32))  # type: ignore[union-attr]
            found = op("Gather", [wide, reader.inputs[1]], axis=0)
            op.replace(reader.outputs[0], op("Cast", [found], to=HALF))

    with pytest.raises(BuildError, match=r"the plan has [\d.]+ MB for [\d.]+ MB of weights, expected at most"):
        build(library, wide_bundle, "text", tmp_path, trap=widen)


def test_a_plan_that_no_longer_tells_is_refused(library: Library, precise_bundle: Path, tmp_path: Path) -> None:
    """A later release may write its plans otherwise: then nothing is known of its sums, and nothing is assumed."""
    compiled = build(library, precise_bundle, "text", tmp_path, "fp16-fast")
    expected = for_tensorrt(read(precise_bundle / "text-fp16.onnx"), "fp16-acc32")
    silent = bytes(memoryview(compiled.plan)).replace(b"fully_connected={", b"gemm={")
    for policy, words in (("fp16-acc32", "the plan does not record how products are summed"), ("fp16-fast", None)):
        report = report_on([], silent, replace(expected, products=(), attention=()), policy, records_sums=True)
        assert report.summed_in_float32 is None
        assert any(words in problem for problem in report.problems) if words else not report.problems


def test_a_kernels_name_may_tell_its_sums() -> None:
    """Where a kernel's name tells its types, as the full TensorRT's do, its sums are read from that."""
    line = (
        "Layers:\nName: blocks.0.fc1_myl0_3, LayerType: gemm, "
        "Inputs: [ { Name: x, Dimensions: [-1,64], Datatype: Half, "
        "Format: (Linear) Row major linear format }], Constants: [ { Name: w, Dimensions: [64,32], Datatype: Half, "
        "Format: (Linear) Row major linear format }], Outputs: [ { Name: y, Dimensions: [-1,32], Datatype: Half, "
        "Format: (Linear) Row major linear format }], TacticName: sm80_xmma_gemm_f16f16_SUMS_tn_n_tilesize64x64x64, "
        "StreamId: 0, Metadata: [ONNX Layer: blocks.0.fc1][ONNX Layer: node_Cast_3]\n"
    )
    expected = Expected((), None, ("blocks.0.fc1",), 0, 4096)
    (kernel,) = read_kernels(line.replace("SUMS", "f16f32_f32"))
    assert (kernel.kind, kernel.nodes) == ("gemm", ("blocks.0.fc1", "node_Cast_3"))
    assert kernel.weight() == Operand((64, 32), "Half")
    assert report_on([kernel], b"", expected, "fp16-acc32").problems == ()
    (problem,) = report_on(read_kernels(line.replace("SUMS", "f16f16_f16")), b"", expected, "fp16-acc32").problems
    words = "blocks.0.fc1: products are summed in float16, according to the kernel's name (sm80_xmma_gemm_"
    assert problem.startswith(words)
    assert report_on(read_kernels(line.replace("SUMS", "f16f16_f16")), b"", expected, "fp16-fast").problems == ()


def test_the_mask_is_read_before_it_is_expanded(library: Library, precise_bundle: Path, tmp_path: Path) -> None:
    """[B, 1, 1, T] and not [B, 1, T, T], which every block would read: seen in what the kernels read."""
    seen: list[Kernel] = []

    def spy(text: str) -> list[Kernel]:
        seen.extend(read_kernels(text))
        return read_kernels(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jinaclip_engines.tensorrt.compiler.read_kernels", spy)
        build(library, precise_bundle, "text", tmp_path)
    attention = [kernel for kernel in seen if kernel.is_attention]
    assert len(attention) == 3
    for kernel in attention:
        masks = [operand.shape for operand in kernel.reads if len(operand.shape) == 4]
        assert masks and all(shape[1:3] == (1, 1) for shape in masks)


def test_tf32_is_off(library: Library, precise_bundle: Path, tmp_path: Path) -> None:
    """On by default, and it would round the float32 operands of kept blocks to 10 bits."""
    trt = library.module
    model = read(precise_bundle / "image-fp16.onnx")
    for_tensorrt(model, "fp16-acc32")
    write(model, tmp_path / "graph.onnx")
    builder = trt.Builder(logger_of(library))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger_of(library))
    assert parser.parse_from_file(str(tmp_path / "graph.onnx"))
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)
    config = _configure(trt, builder, network, IMAGE, ("sm89",), 512)
    assert not config.get_flag(trt.BuilderFlag.TF32) and config.max_aux_streams == 0
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 512 << 20
    assert config.num_optimization_profiles == 1
    del parser, network, config, builder


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_a_timing_cache_is_whole_or_as_it_was(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT alone fills it; the calls are the same in TensorRT-RTX."""
    config = library.module.Builder(logger_of(library)).create_builder_config()
    path = tmp_path / "engines/timing.cache"
    assert _load_timing_cache(config, path) is not None and _load_timing_cache(config, None) is None
    _save_timing_cache(config, path)
    written = path.read_bytes()
    assert written and _load_timing_cache(config, path) is not None
    path.write_bytes(b"as it was")

    def interrupted(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", interrupted)
    _save_timing_cache(config, path)
    assert path.read_bytes() == b"as it was" and list(path.parent.iterdir()) == [path]


def test_graphs_of_onnxruntimes_own_operators_are_refused(
    library: Library, precise_bundle: Path, tmp_path: Path
) -> None:
    """What ONNX Runtime's optimiser writes is no input for TensorRT, though it is an .onnx file."""
    ort = import_onnxruntime()
    options = session_options(ort)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(precise_bundle / "text-fp32.onnx"), options, providers=["CPUExecutionProvider"])
    expected = for_tensorrt(read(precise_bundle / "text-fp16.onnx"), "fp16-acc32")
    with pytest.raises(BuildError, match=r"cannot parse optimised\.onnx"):
        compile_plan(library, tmp_path / "optimised.onnx", expected, "fp16-acc32", TEXT, targets=("sm89",))


def test_errors_of_the_library_arrive_in_one_line(library: Library, tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"not a graph")
    nothing = Expected((), None, (), 0, 0)
    with pytest.raises(BuildError, match=r"cannot parse graph\.onnx: .+") as caught:
        compile_plan(library, tmp_path / "graph.onnx", nothing, "fp16-acc32", TEXT, targets=("sm89",))
    assert "\n" not in str(caught.value)


def test_each_block_hears_its_own_messages(library: Library) -> None:
    """The first logger that a process gives the library serves for good; what it hears goes to whoever listens."""
    logger = logger_of(library)
    assert logger is logger_of(load_library("tensorrt-rtx"))
    with Messages(library) as outer:
        with Messages(library) as inner:
            logger.log(library.module.ILogger.Severity.ERROR, "both")
        logger.log(library.module.ILogger.Severity.WARNING, "outer alone")
    logger.log(library.module.ILogger.Severity.ERROR, "nobody")
    assert inner.lines == [("ERROR", "both")]
    assert outer.lines == [("ERROR", "both"), ("WARNING", "outer alone")] and outer.errors() == "both"


# The command


@pytest.fixture(scope="module")
def built(precise_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(precise_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    assert main(["build", str(copy), "--backend", "tensorrt-rtx", "--target", "sm86,sm89"]) == 0
    return copy


def test_build_writes_an_engine_with_all_that_it_is_tied_to(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines = sorted((built / "engines").iterdir())
    assert [path.name.rpartition("-")[0] for path in engines] == ["image-fp16-tensorrt-rtx", "text-fp16-tensorrt-rtx"]
    for directory in engines:
        assert sorted(path.name for path in directory.iterdir()) == ["engine.json", "plan.engine"]
        sidecar = json.loads((directory / "engine.json").read_text("utf-8"))
        assert sidecar["targets"] == ["sm86", "sm89"] and sidecar["gpu"] is None and sidecar["self_test"] is None
        assert sidecar["policy"] == "fp16-acc32" and sidecar["flags"]["tf32"] is False
        assert sidecar["version"] == load_library("tensorrt-rtx").version
        assert sidecar["report"]["problems"] == []
        for field in sidecar:
            assert f"`{field}`" in PAGE, f"docs/bundle.md does not tell of {field}"
        assert sidecar["files"]["plan.engine"]["bytes"] == (directory / "plan.engine").stat().st_size
    before = [path.stat().st_mtime_ns for path in engines]
    capsys.readouterr()
    assert main(["build", str(built), "--backend", "tensorrt-rtx", "--target", "sm89,sm86", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [entry["made"] for entry in json.loads(out)] == [False, False] and err == ""
    assert [path.stat().st_mtime_ns for path in engines] == before


@pytest.mark.parametrize(
    "words",
    [["--target", "sm89"], ["--policy", "fp16-fast", "--target", "sm86,sm89"], ["--profile", "edge"],
     ["--workspace", "256", "--target", "sm86,sm89"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_another_setting_is_another_engine(built: Path, tmp_path: Path, words: list[str]) -> None:
    copy = shutil.copytree(built, tmp_path / "bundle")
    assert main(["build", str(copy), "--backend", "tensorrt-rtx", "--towers", "text", *words]) == 0
    assert len(list((copy / "engines").glob("text-*"))) == 2
    assert len(list((copy / "engines").glob("image-*"))) == 1


def test_without_a_gpu_every_generation_is_compiled_for(precise_bundle: Path, tmp_path: Path) -> None:
    if driver_problem() is None:
        pytest.skip("there is a GPU here, and --target is it")
    words = ["build", str(precise_bundle), "--backend", "tensorrt-rtx", "--towers", "image", "--cache", str(tmp_path)]
    assert main(words) == 0
    (sidecar,) = tmp_path.glob("*/engines/*/engine.json")
    assert len(json.loads(sidecar.read_text("utf-8"))["targets"]) == 6
    assert not (precise_bundle / "engines").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "sm90"], "--target sm90 is unknown; TensorRT-RTX supports sm75, sm80"),
        (["--profile", "desktop"], "--profile desktop is not server or edge or a readable file"),
        (["--precision", "int8"], "--precision has no effect with --backend tensorrt-rtx"),
        (["--device", "cpu"], "builds for GPUs"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_built_is_said(
    precise_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    command = ["build", str(precise_bundle), "--backend", "tensorrt-rtx", "--cache", str(tmp_path), *words]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["0", "-3", "much", "1e3"])
def test_wrong_usage(precise_bundle: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", str(precise_bundle), "--backend", "tensorrt-rtx", "--workspace", value])
    assert caught.value.code == 2 and "expected a whole number of MiB" in capsys.readouterr().err


def test_a_bundle_without_fp16_is_told_what_it_lacks(small_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(small_bundle), "--backend", "tensorrt-rtx", "--target", "sm89"]) == 1
    assert "has no fp16 text graph (it has: fp32)" in capsys.readouterr().err


def test_a_refused_engine_leaves_nothing(
    precise_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that goes wrong one day: the compiler finds other sums, nothing is written, and an older engine stays."""
    copy = shutil.copytree(precise_bundle, tmp_path / "bundle")
    command = ["build", str(copy), "--backend", "tensorrt-rtx", "--target", "sm89", "--towers", "text"]
    assert main(command) == 0
    (engine,) = (copy / "engines").iterdir()
    monkeypatch.setattr(passes, "sum_in_float32", lambda model: None)
    assert main([*command, "--force"]) == 1
    error = capsys.readouterr().err
    assert "blocks.0.qkv: products are not summed in float32" in error and "Nothing was written" in error
    assert list((copy / "engines").iterdir()) == [engine]
    assert json.loads((engine / "engine.json").read_text("utf-8"))["report"]["problems"] == []


@pytest.mark.slow
def test_the_full_size(library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """24 blocks of both towers, 250,002 pieces, four generations and the server's profiles."""
    bundle = tmp_path / "full"
    assert main(["export", "--random", "full", "--precision", "fp32,fp16", "--output", str(bundle)]) == 0
    capsys.readouterr()
    command = ["build", str(bundle), "--backend", "tensorrt-rtx", "--target", ",".join(TARGETS), "--json"]
    assert main(command) == 0
    for entry, attention, products in zip(json.loads(capsys.readouterr().out), (72, 48), (96, 120), strict=True):
        report = entry["report"]
        assert (report["attention"], report["products"], report["summed_in_float32"]) == (attention, products, products)
        assert report["attention_sums"] == ["FP32"] and report["problems"] == []
        assert report["plan_bytes"] <= 1.05 * report["weight_bytes"] + report["profiles"] * (16 << 20)
