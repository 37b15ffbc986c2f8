"""Bundles that are damaged, hostile, read-only or half there: refused with a reason, or they work as before."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from jinaclip import BackendError, BundleError, ClipModel, InputError, SelfTestFailed
from jinaclip.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES, Bundle
from jinaclip_export.bundle.manifest import Identity
from jinaclip_export.bundle.writer import export_bundle
from jinaclip_export.checkpoint.reader import Checkpoint
from tests.conftest import PHOTOS, MakeCheckpoint

TEXT = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64,
}  # fmt: skip
VISION = {"width": 32, "layers": 1, "image_size": 28, "head_width": 32}
PHOTO = PHOTOS[1]
NOBODY = 65534


@pytest.fixture(scope="module")
def tiny(make_checkpoint: MakeCheckpoint) -> Path:
    """A bundle of one block a tower, opened once; copied by `bundle`."""
    checkpoint = make_checkpoint(32, text=TEXT, vision=VISION)
    output = checkpoint.parent / "tiny-bundle"
    export_bundle(Checkpoint(checkpoint), output, identity=Identity("tiny", "r1", "none"))
    return output


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def read(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / MANIFEST).read_text("utf-8"))
    return manifest


def write(bundle: Path, manifest: Any) -> None:
    (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def relist(bundle: Path, *names: str) -> None:
    """Make bundle.json agree with files that were changed, as someone who means harm would."""
    manifest = read(bundle)
    for name in names:
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if name == manifest.get("text", {}).get("tokenizer"):
            manifest["tokenizer_sha256"] = manifest["files"][name]["sha256"]
    write(bundle, manifest)


def flip(path: Path, offset: int, content: bytes) -> None:
    """Overwrite bytes in place: the size stays."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def refused(bundle: Path, *parts: str, error: type[Exception] = BundleError, **options: Any) -> None:
    """Opening fails with exactly this class, and the message has every part."""
    with pytest.raises(error) as caught:
        ClipModel(bundle, **options)
    assert type(caught.value) is error
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


# What is not a bundle


def test_directories_that_are_no_bundle(tmp_path: Path, small_checkpoint: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nowhere", "nowhere is not a directory", "jinaclip export")
    refused(tmp_path / "file", "file is not a directory", "jinaclip export")
    refused(tmp_path / "empty", "has no bundle.json, so it is not a bundle")
    refused(small_checkpoint, "has no bundle.json", "looks like a checkpoint: run `jinaclip export`")
    refused(tmp_path / ("x" * 5000), "cannot be read", "File name too long")
    for strange in ("\0", "\udcff"):
        refused(tmp_path / strange)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b'{"format": "jinaclip-bundle", \xff}', "not readable JSON"),
        (b"[" * 200_000, "not readable JSON"),
        (b'{"a":' * 50_000, "not readable JSON"),
        (b'{"format_version": ' + b"1" * 5000 + b"}", "not readable JSON"),
        (b"[]", "is not a jinaclip-bundle manifest"),
        (b"null", "is not a jinaclip-bundle manifest"),
        (b'{"format": "other-bundle", "format_version": 1}', "is not a jinaclip-bundle manifest"),
    ],
    ids=["empty", "cut", "not UTF-8", "deep list", "deep object", "long number", "list", "null", "other format"],
)
def test_manifests_that_are_none(bundle: Path, content: bytes, part: str) -> None:
    (bundle / MANIFEST).write_bytes(content)
    refused(bundle, MANIFEST, part)


def test_a_huge_manifest_is_not_even_read(bundle: Path) -> None:
    os.truncate(bundle / MANIFEST, 1 << 40)  # sparse
    refused(bundle, f"{1 << 40} bytes, expected at most {MAX_MANIFEST_BYTES}")


@pytest.mark.parametrize("version", [2, 99, 0, -1, "1", 1.0, True, None])
def test_other_format_versions_are_refused_by_name(bundle: Path, version: Any) -> None:
    write(bundle, read(bundle) | {"format_version": version})
    refused(bundle, f"format version {version!r}", "reads 1 to 1", "upgrade jinaclip, or export the bundle again")


def test_a_manifest_that_knows_more_is_read(bundle: Path) -> None:
    manifest = read(bundle)
    manifest["later"] = manifest["text"]["later"] = manifest["towers"]["text"]["later"] = {"x": [1]}
    write(bundle, manifest)
    with ClipModel(bundle) as model:
        assert model.encode_text("cat").shape == (32,)


# Every key of the manifest, dropped or replaced

NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 3, 1.5, 10**30, -(10**400), math.inf, -math.inf, math.nan, "", "x", "0", "\0",
    "\ud800", "../x", "/etc/passwd", "x" * 5000, [], {}, [None], [[]], [{}], {"x": None}, {"x": {}}, "text-fp32.onnx",
]  # fmt: skip


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every object's keys and of the first two entries of every list."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from keys(inner, (*path, key))


def mutations(manifest: dict[str, Any], rng: random.Random, each: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The manifest with one key dropped, and with `each` other values in its place, for every key."""
    for path in keys(manifest):
        for value in ("drop", *rng.sample(NASTY, each)):
            changed = copy.deepcopy(manifest)
            inner: Any = changed
            for key in path[:-1]:
                inner = inner[key]
            if value == "drop":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            yield f"{'.'.join(map(str, path))} = {value!r:.40}", changed


def test_any_change_of_the_manifest_is_refused_or_harmless(bundle: Path) -> None:
    with ClipModel(bundle, threads=1) as model:
        expected = {"text": model.encode_text("a cat"), "image": model.encode_image(PHOTO)}
    good, worked, failed = read(bundle), 0, 0
    for what, manifest in mutations(good, random.Random(3), each=2):
        write(bundle, manifest)
        try:
            opened = Bundle(bundle)
        except BundleError as error:
            assert "\n" not in str(error), what
            failed += 1
            continue
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
        try:
            model = ClipModel(bundle, self_test="always", threads=1)
        except (BundleError, BackendError):
            failed += 1
            continue
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
        with model:
            json.dumps(model.info())
            for tower in opened.towers:
                found = model.encode_text("a cat") if tower == "text" else model.encode_image(PHOTO)
                assert np.array_equal(found, expected[tower]), what
        worked += 1
    assert worked > 50 and failed > 100  # both sides are there


# Files


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "..", "a\\b", "..\\x", "C:\\x", "a\0b", "", "//x"], ids=repr
)
@pytest.mark.parametrize("where", ["listed", "graph", "tokenizer", "golden"])
def test_names_that_leave_the_bundle(bundle: Path, name: str, where: str) -> None:
    (bundle.parent / "x").write_bytes(b"outside")
    manifest = read(bundle)
    entry = {"bytes": 7, "sha256": hashlib.sha256(b"outside").hexdigest()}
    manifest["files"] = {name: entry} | manifest["files"] if where == "listed" else manifest["files"]
    if where == "graph":
        manifest["towers"]["text"]["graphs"]["fp32"] = name
    elif where == "tokenizer":
        manifest["text"]["tokenizer"] = name
    elif where == "golden":
        manifest["goldens"]["image"][0]["path"] = name
    write(bundle, manifest)
    refused(bundle, repr(name), "leaves the bundle" if where == "listed" else "does not list it in files")


def test_links_may_not_leave_the_bundle(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "tokenizer.json", tmp_path / "tokenizer.json")
    (bundle / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    refused(bundle, "tokenizer.json is a link that leaves the bundle")
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to("tokenizer.json")  # in a circle
    refused(bundle)
    (bundle / "tokenizer.json").unlink()
    (bundle / "inside").mkdir()
    shutil.move(tmp_path / "tokenizer.json", bundle / "inside/tokenizer.json")
    (bundle / "tokenizer.json").symlink_to("inside/tokenizer.json")
    (tmp_path / "link").symlink_to(bundle)
    with ClipModel(tmp_path / "link") as model:  # links that stay inside, and one to the bundle, are fine
        model.encode_text("cat")


def test_weights_outside_the_bundle_are_not_read(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "text-fp32.onnx.data", tmp_path / "outside.data")
    manifest = read(bundle)
    del manifest["files"]["text-fp32.onnx.data"]
    write(bundle, manifest)

    def point_outside(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "../outside.data" if entry.key == "location" else entry.value

    operate(bundle, "text", point_outside)
    refused(bundle, "cannot open", "text-fp32.onnx", "jinaclip verify")


@pytest.mark.parametrize("name", ["text-fp32.onnx", "image-fp32.onnx.data", "tokenizer.json", "golden-0.png"])
def test_missing_and_cut_files_are_named(bundle: Path, name: str) -> None:
    size = (bundle / name).stat().st_size
    os.truncate(bundle / name, size - 1)
    refused(bundle, f"{name} has {size - 1} bytes, expected {size}", "copy the bundle again")
    (bundle / name).unlink()
    refused(bundle, f"has no {name}, which bundle.json lists", "copy the bundle again")
    (bundle / name).mkdir()
    refused(bundle, f"has no {name}")


@pytest.mark.parametrize("name", ["text-fp32.onnx", "image-fp32.onnx.data", "tokenizer.json", "golden-0.png"])
def test_changed_bytes_of_equal_size_fail_verification(bundle: Path, name: str) -> None:
    Bundle(bundle).verify_hashes()
    middle = (bundle / name).stat().st_size // 2
    flip(bundle / name, middle, bytes([(bundle / name).read_bytes()[middle] ^ 1]))
    with pytest.raises(BundleError, match=rf"{name} has sha256 [0-9a-f]{{16}}…, expected [0-9a-f]{{16}}…; .*copy or"):
        Bundle(bundle).verify_hashes()


@pytest.mark.parametrize("tower", ["text", "image"])
def test_changed_weights_do_not_pass_the_self_test(bundle: Path, tower: str) -> None:
    """One bit of every weight: a copy that went wrong with the right size, which only vectors can show."""
    ClipModel(bundle).close()  # leaves the note of a passed image self-test
    path = bundle / f"{tower}-fp32.onnx.data"
    weights = np.frombuffer(path.read_bytes(), np.uint32) ^ (1 << 21)
    path.write_bytes(weights.tobytes())
    refused(bundle, f"self-test of {tower} fp32", f"{tower} golden", "jinaclip verify", error=SelfTestFailed)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_nan_weights_do_not_pass_the_self_test(bundle: Path, tower: str) -> None:
    path = bundle / f"{tower}-fp32.onnx.data"
    path.write_bytes(np.full(path.stat().st_size // 4, np.nan, np.float32).tobytes())
    refused(bundle, f"self-test of {tower} fp32", "NaN or infinity", "not used", error=SelfTestFailed)


@pytest.mark.parametrize("name", ["text-fp32.onnx", "text-fp32.onnx.data"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_cut_files_with_a_manifest_to_match(bundle: Path, name: str, kept: float) -> None:
    os.truncate(bundle / name, int((bundle / name).stat().st_size * kept))
    relist(bundle, name)
    refused(bundle, "onnxruntime", "cannot open", "text-fp32.onnx", "export it again")


def test_swapped_graphs_and_weights(bundle: Path) -> None:
    def swap(suffix: str) -> None:
        shutil.move(bundle / f"text-fp32.onnx{suffix}", bundle / "other")
        shutil.move(bundle / f"image-fp32.onnx{suffix}", bundle / f"text-fp32.onnx{suffix}")
        shutil.move(bundle / "other", bundle / f"image-fp32.onnx{suffix}")

    swap("")
    refused(bundle, "bytes, expected")
    relist(bundle, "text-fp32.onnx", "image-fp32.onnx")
    refused(bundle, "onnxruntime failed to run the graph", "pixel_values", error=BackendError)
    swap("")
    swap(".data")
    relist(bundle, "text-fp32.onnx", "image-fp32.onnx", "text-fp32.onnx.data", "image-fp32.onnx.data")
    refused(bundle, "cannot open", "text-fp32.onnx", towers=("text",))


# Graphs that open and are wrong


def operate(bundle: Path, tower: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph and list it as it then is."""
    path = bundle / f"{tower}-fp32.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    relist(bundle, path.name)


def append(name: str, op: str, *inputs: np.ndarray, kind: int = TensorProto.FLOAT, **attributes: Any) -> Any:
    """A change that puts one more node behind the output `name`."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["before" if n == name else n for n in names]
        constants = [f"constant_{i}" for i in range(len(inputs))]
        graph.initializer.extend(numpy_helper.from_array(v, n) for v, n in zip(inputs, constants, strict=True))
        graph.node.append(helper.make_node(op, ["before", *constants], [name], **attributes))
        (output,) = (o for o in graph.output if o.name == name)
        output.CopyFrom(helper.make_tensor_value_info(name, kind, None))

    return change


def without_output(name: str) -> Any:
    def change(model: onnx.ModelProto) -> None:
        (output,) = (o for o in model.graph.output if o.name == name)
        model.graph.output.remove(output)

    return change


def with_input(name: str) -> Any:
    def change(model: onnx.ModelProto) -> None:
        (old,) = model.graph.input
        for node in model.graph.node:
            node.input[:] = [name if n == old.name else n for n in node.input]
        old.name = name

    return change


DOUBLE, HALF = TensorProto.DOUBLE, TensorProto.FLOAT16


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("output", ["", "l2norm_"])
def test_outputs_that_are_not_as_promised(bundle: Path, tower: str, output: str) -> None:
    """Each output is held to the goldens: encode reads the raw one, hosts in C the unit one."""
    name = f"{output}{tower}_embeddings"
    last = 31 if tower == "text" else 0
    for change, part in (
        (append(name, "Cast", kind=DOUBLE, to=DOUBLE), "is float64 [2, 32], expected float32 [2, 32]"),
        (append(name, "Cast", kind=HALF, to=HALF), "is float16 [2, 32], expected float32 [2, 32]"),
        (append(name, "Unsqueeze", np.array([1])), "is float32 [2, 1, 32], expected float32 [2, 32]"),
        (append(name, "Slice", np.array([0]), np.array([16]), np.array([1])), "is float32 [2, 16], expected"),
        (append(name, "Slice", np.array([0]), np.array([1]), np.array([0])), "is float32 [1, 32], expected"),
        (append(name, "Neg"), "golden"),
        (append(name, "Add", np.eye(32, dtype=np.float32)[last] / 5), "of the distance to the nearest other golden"),
        (append(name, "Mul", np.array([0], np.float32)), "of the distance to the nearest other golden"),
        (append(name, "Div", np.array([0], np.float32)), "contains NaN or infinity"),
        (append(name, "ReduceMean", np.array([0]), keepdims=1), "is float32 [1, 32], expected"),
        (without_output(name), f"the graph has no output {name}"),
    ):
        shutil.copy(bundle / f"{tower}-fp32.onnx", bundle.parent / "good.onnx")
        operate(bundle, tower, change)
        refused(bundle, f"self-test of {tower} fp32 on onnxruntime cpu", name, part, error=SelfTestFailed)
        shutil.copy(bundle.parent / "good.onnx", bundle / f"{tower}-fp32.onnx")
        relist(bundle, f"{tower}-fp32.onnx")
    with ClipModel(bundle) as model:
        assert model.dims == (32,)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_a_graph_whose_output_is_constant(bundle: Path, tower: str) -> None:
    """The vector of the first golden whatever comes in: only distinct goldens show it."""
    golden = np.frombuffer(base64.b64decode(read(bundle)["goldens"][tower][0]["embedding"]), np.float32)

    def change(model: onnx.ModelProto) -> None:
        for output in (f"{tower}_embeddings", f"l2norm_{tower}_embeddings"):
            append(output, "Mul", np.array([0], np.float32))(model)
            rename(model, output, f"zero_{output}")
            rename(model, "before", f"was_{output}")
            rename(model, "constant_0", f"nought_{output}")
            model.graph.initializer[-1].name = f"nought_{output}"
            model.graph.initializer.append(numpy_helper.from_array(golden, f"golden_{output}"))
            model.graph.node.append(helper.make_node("Add", [f"zero_{output}", f"golden_{output}"], [output]))

    operate(bundle, tower, change)
    refused(bundle, f"for {tower} golden 1 is", "nearest other golden", error=SelfTestFailed)


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    """A value between nodes; the graph's own inputs and outputs keep their names."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if n == old else n for n in names]


def test_inputs_that_are_not_as_promised(bundle: Path) -> None:
    operate(bundle, "text", with_input("ids"))
    refused(bundle, "failed to run the graph", "ids", "input_ids", error=BackendError)
    operate(bundle, "text", with_input("input_ids"))

    def to_int32(model: onnx.ModelProto) -> None:
        with_input("wide")(model)
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("input_ids", TensorProto.INT32, ["b", "t"]))
        model.graph.node.insert(0, helper.make_node("Cast", ["input_ids"], ["wide"], to=TensorProto.INT64))

    operate(bundle, "text", to_int32)
    refused(bundle, "failed to run the graph", "int64", "int32", error=BackendError)


# The tokenizer and the goldens


def retokenize(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((bundle / "tokenizer.json").read_text("utf-8"))
    change(document)
    (bundle / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    relist(bundle, "tokenizer.json")


def test_a_tokenizer_whose_ids_do_not_fit(bundle: Path) -> None:
    retokenize(bundle, lambda d: d["model"]["vocab"].append(["one more", -1.0]))
    refused(bundle, "ids up to 512", "512 rows", "tokenizer of the same checkpoint")


def test_a_tokenizer_whose_special_tokens_differ(bundle: Path) -> None:
    def swap(document: dict[str, Any]) -> None:
        for entry in document["added_tokens"]:
            entry["content"] = {"<s>": "</s>", "</s>": "<s>"}.get(entry["content"], entry["content"])
        vocabulary = document["model"]["vocab"]
        vocabulary[0], vocabulary[2] = vocabulary[2], vocabulary[0]

    retokenize(bundle, swap)
    refused(bundle, "id 2 for <s>, the text tower expects 0", "tokenizer of the same checkpoint")
    (bundle / "tokenizer.json").write_text("{}")
    relist(bundle, "tokenizer.json")
    refused(bundle, "is not a readable tokenizer.json")


def test_a_tokenizer_without_its_template(bundle: Path) -> None:
    retokenize(bundle, lambda d: d.update(post_processor=None))
    refused(bundle, "turns an empty text into [], expected [0, 2]")


def test_a_tokenizer_that_cuts_text_otherwise(bundle: Path) -> None:
    """Every id is in range and the special tokens are right: only the goldens' ids tell."""

    def swap(document: dict[str, Any]) -> None:
        vocabulary = document["model"]["vocab"]
        a, b = (next(i for i, (piece, _) in enumerate(vocabulary) if piece == p) for p in ("e", "t"))
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    retokenize(bundle, swap)
    refused(bundle, "text golden 0: the tokenizer returns [0, ", "expected [0, ", error=SelfTestFailed)


def test_a_golden_picture_that_changed(bundle: Path) -> None:
    shutil.copy(bundle / "golden-1.png", bundle / "golden-0.png")
    relist(bundle, "golden-0.png")
    refused(bundle, "image golden 0: preprocessing returns other pixels", "Pillow", error=SelfTestFailed)
    flip(bundle / "golden-0.png", 0, b"damaged")
    refused(bundle, "image golden 0:", "golden-0.png", "expected an image file", "verify", error=SelfTestFailed)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_golden_vectors_that_changed(bundle: Path, tower: str) -> None:
    manifest = read(bundle)
    golden = manifest["goldens"][tower][1]
    good = np.frombuffer(base64.b64decode(golden["embedding"]), np.float32)
    other = good + np.float32(0.001)
    for vector, error, part in (
        (good * np.nan, BundleError, f"{tower} golden 1 is not a vector of 32 finite numbers"),
        (good[:16], BundleError, f"{tower} golden 1 is not a vector of 32 finite numbers"),
        (good * 0, SelfTestFailed, f"for {tower} golden 1 is"),
        (other, SelfTestFailed, f"for {tower} golden 1 is"),
    ):
        golden["embedding"] = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        write(bundle, manifest)
        refused(bundle, part, error=error)
    golden["embedding"] = "no base64!"
    write(bundle, manifest)
    refused(bundle, "does not follow the bundle format")
    del manifest["goldens"][tower][1]  # one alone would pass whatever the graph returns
    write(bundle, manifest)
    refused(bundle, f"at least two {tower} goldens")


# What is remembered of the image tower's self-test


def remembered(bundle: Path, **options: Any) -> bool:
    with ClipModel(bundle, towers=("image",), **options) as model:
        return bool(model.info()["towers"]["image"]["self_test"]["remembered"])


def test_a_passed_image_self_test_is_remembered(bundle: Path) -> None:
    assert not (bundle / "selftest").exists()  # export leaves none: it passed on another machine
    assert not remembered(bundle)
    (note,) = (bundle / "selftest").iterdir()
    assert json.loads(note.read_text("utf-8"))["backend"] == "onnxruntime"
    before = note.stat().st_mtime_ns
    assert remembered(bundle)
    assert remembered(bundle, threads=1)  # the number of threads is not another backend
    assert [*(bundle / "selftest").iterdir()] == [note] and note.stat().st_mtime_ns == before
    assert not remembered(bundle, self_test="always")
    Bundle(bundle).verify_hashes()  # notes are no part of what is verified


def test_a_changed_file_is_tested_again(bundle: Path) -> None:
    remembered(bundle)
    os.utime(bundle / "image-fp32.onnx.data", (1, 1))
    assert not remembered(bundle)
    assert remembered(bundle)
    manifest = read(bundle)
    manifest["image"]["resize_mode"] = "squash"  # the goldens' pixels are no longer those of the note
    write(bundle, manifest)
    refused(bundle, "other pixels", error=SelfTestFailed)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b"null", b"{}", b'{"ratio": "0.0"}', b'{"ratio": NaN}', b'{"ratio": 0.5}',
     b'{"other": 1}', b'{"a":' * 50_000],
    ids=["empty", "cut", "not UTF-8", "list", "null", "no ratio", "text", "NaN", "failed", "other", "deep"],
)  # fmt: skip
def test_a_damaged_note_is_ignored_and_replaced(bundle: Path, content: bytes) -> None:
    remembered(bundle)
    (note,) = (bundle / "selftest").iterdir()
    note.write_bytes(content)
    assert not remembered(bundle)
    assert remembered(bundle)


def test_a_graph_in_a_directory_is_tested_again_too(bundle: Path) -> None:
    (bundle / "graphs").mkdir()
    manifest = read(bundle)
    for name in ("image-fp32.onnx", "image-fp32.onnx.data"):
        shutil.move(bundle / name, bundle / "graphs" / name)
        manifest["files"][f"graphs/{name}"] = manifest["files"].pop(name)
    manifest["towers"]["image"]["graphs"]["fp32"] = "graphs/image-fp32.onnx"
    write(bundle, manifest)
    assert not remembered(bundle)
    assert remembered(bundle)
    path = bundle / "graphs/image-fp32.onnx.data"
    path.write_bytes((np.frombuffer(path.read_bytes(), np.uint32) ^ (1 << 21)).tobytes())
    refused(bundle, "image golden", error=SelfTestFailed)


# A bundle that may not be written


@contextmanager
def unprivileged() -> Iterator[None]:
    """Inside, file permissions hold for this process even if it runs as root."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def readable(tiny: Path, tmp_path: Path) -> Iterator[Path]:
    """A directory that everyone may enter, with a bundle that nobody may change."""
    ClipModel(tiny, cache_dir=tmp_path).close()  # what is imported on the way need not be readable for everyone
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        top.chmod(0o755)
        bundle = Path(shutil.copytree(tiny, top / "bundle"))
        for path in bundle.iterdir():
            path.chmod(0o444)
        bundle.chmod(0o555)
        (top / "cache").mkdir()
        (top / "cache").chmod(0o777)
        yield top
        bundle.chmod(0o755)


def test_a_read_only_bundle_opens(readable: Path) -> None:
    bundle = readable / "bundle"
    before = sorted(bundle.iterdir())
    with unprivileged():
        with pytest.raises(PermissionError):
            (bundle / "x").touch()
        assert not remembered(bundle)
        assert not remembered(bundle)  # no place for a note
        assert not remembered(bundle, cache_dir=readable / "cache")
        assert remembered(bundle, cache_dir=readable / "cache")
        assert not remembered(bundle, cache_dir=bundle / "cache")  # it may not be made
    assert sorted(bundle.iterdir()) == before
    assert [path.suffix for path in (readable / "cache").rglob("*") if path.is_file()] == [".json"]


def test_files_that_may_not_be_read(readable: Path) -> None:
    (readable / "bundle/tokenizer.json").chmod(0)
    with unprivileged():
        refused(readable / "bundle", "tokenizer.json")
    (readable / "bundle" / MANIFEST).chmod(0)
    with unprivileged():
        refused(readable / "bundle", MANIFEST, "Permission denied")


def test_one_cache_directory_serves_many_bundles(bundle: Path, tiny: Path, tmp_path: Path) -> None:
    for directory in (only(bundle, "image"), tiny):
        assert not remembered(directory, cache_dir=tmp_path / "new" / "cache")
        assert remembered(directory, cache_dir=tmp_path / "new" / "cache")
    assert not (bundle / "selftest").exists()


# Provenance


def provenance(bundle: Path, change: Callable[[dict[str, Any]], Any] | None = None, **options: Any) -> str:
    manifest = read(bundle)
    if change:
        change(manifest)
        write(bundle, manifest)
    return Bundle(bundle).provenance({"text": "fp32", "image": "fp32"}, **options)


def test_provenance_is_of_what_decides_a_vector(bundle: Path) -> None:
    first = provenance(bundle)
    assert first.startswith("jc1-") and len(first) == 20
    with ClipModel(bundle) as model:
        assert model.provenance == first == model.info()["provenance"]
    assert provenance(bundle, lambda m: m["model"].update(id="other", revision="r2", licence="x")) == first
    assert provenance(bundle, lambda m: m.update(created_by={"torch": "9"}, logit_scale=1.0)) == first
    ids = {
        first,
        provenance(bundle, resize_mode="squash"),
        provenance(bundle, resize_mode="longest"),
        provenance(bundle, exif_transpose=True),
        Bundle(bundle).provenance({"text": "int8", "image": "int8"}),
        Bundle(bundle).provenance({"text": "int8", "image": "fp32"}),
        Bundle(bundle).provenance({"text": "fp32", "image": "int8"}),
        provenance(bundle, lambda m: m["image"].update(mean=[0.5, 0.5, 0.5])),
        provenance(bundle, lambda m: m["model"].update(adaptation="text-matching")),
        provenance(bundle, lambda m: m["model"].update(weights_sha256="0" * 64)),
        provenance(
            bundle,
            lambda m: (m["files"]["tokenizer.json"].update(sha256="0" * 64), m.update(tokenizer_sha256="0" * 64)),
        ),
    }
    assert len(ids) == 11
    assert provenance(bundle, resize_mode="shortest") == provenance(bundle)  # the bundle's own, said aloud
    fp16 = Bundle(bundle).provenance({"text": "fp16", "image": "fp32"})
    assert fp16 == provenance(bundle)  # one class


def test_towers_exported_apart_have_one_provenance(small_checkpoint: Path, small_bundle: Path, tmp_path: Path) -> None:
    """Images indexed by one machine are searched with texts of another."""
    for tower in ("text", "image"):
        export_bundle(Checkpoint(small_checkpoint), tmp_path / tower, identity=Identity("apart"), towers=[tower])
        with ClipModel(tmp_path / tower) as model:
            assert model.provenance == provenance(small_bundle)


# Bundles of one tower, and what they lack


def only(bundle: Path, tower: str) -> Path:
    """The bundle as `--towers` would have made it."""
    manifest = read(bundle)
    other = "image" if tower == "text" else "text"
    for section in ("towers", "goldens", "parity"):
        del manifest[section][other]
    manifest.pop("text" if tower == "image" else "", None)  # "image" stays: the provenance is the whole model's
    gone = ("image-", "golden-") if tower == "text" else ("text-", "tokenizer")
    for name in [name for name in manifest["files"] if name.startswith(gone)]:
        del manifest["files"][name]
        (bundle / name).unlink()
    write(bundle, manifest)
    return bundle


def test_a_bundle_without_images(bundle: Path) -> None:
    with ClipModel(only(bundle, "text")) as model:
        assert model.encode_text("cat").shape == (32,)
        assert list(model.info()["towers"]) == ["text"]
        with pytest.raises(InputError, match=r"no image tower \(it has: text\).*cannot encode images.*--towers"):
            model.encode_image(PHOTO)


def test_a_bundle_without_texts(bundle: Path) -> None:
    with ClipModel(only(bundle, "image")) as model:
        assert model.encode_image(PHOTO).shape == (32,)
        assert model.tasks == () and model.max_tokens == 0
        with pytest.raises(InputError, match=r"no text tower \(it has: image\).*cannot encode texts.*--towers"):
            model.encode_text("cat")
    refused(bundle, "no text tower (it has: image)", "--towers text,image", towers=("text",))


def test_a_lacking_image_tower_that_was_asked_for(bundle: Path) -> None:
    refused(only(bundle, "text"), "no image tower (it has: text)", "--towers text,image", towers=("image",))


def test_a_precision_that_only_one_tower_has(bundle: Path) -> None:
    manifest = read(bundle)
    manifest["towers"]["text"]["graphs"]["fp16"] = "text-fp32.onnx"
    write(bundle, manifest)
    with ClipModel(bundle, towers=("text",), precision="fp16") as model:
        assert model.info()["towers"]["text"]["precision"] == "fp16"


@pytest.mark.parametrize("precision", ["int8", "fp16", {"text": "int8"}, {"image": "fp16"}])
def test_a_precision_that_the_bundle_lacks(bundle: Path, precision: Any) -> None:
    name = precision if isinstance(precision, str) else next(iter(precision.values()))
    refused(bundle, f"has no {name}", "(it has: fp32)", "use one of these", precision=precision)
