"""The command line as a user meets it: what comes out of it, how it fails, and what it leaves alone."""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jinaclip import ClipModel
from jinaclip.cli import main
from tests.conftest import PHOTOS, TEXTS

COMMAND = (sys.executable, "-m", "jinaclip")
VERBS = {entry.name: entry for entry in entry_points(group="jinaclip.commands")}
FORMATS = ("jsonl", "npy", "parquet")

Capture = pytest.CaptureFixture[bytes]
Records = list[dict[str, Any]]
Encode = Callable[..., bytes]
Refused = Callable[..., None]
BUNDLE = object()  # stands for the bundle in `refused`


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The real command, in a process of its own."""
    command = [*COMMAND, *(a if isinstance(a, bytes) else str(a) for a in arguments)]
    return subprocess.run(command, **{"capture_output": True, "timeout": 60, **options})


@pytest.fixture
def encode(small_bundle: Path, capsysbinary: Capture) -> Callable[..., bytes]:
    """encode(*arguments): what `jinaclip encode` writes to stdout; stderr stays empty unless it names a file."""

    def call(*arguments: Any) -> bytes:
        capsysbinary.readouterr()
        assert main(["encode", str(small_bundle), *map(str, arguments)]) == 0
        out, err = capsysbinary.readouterr()
        assert err.count(b"\n") <= 1
        return out

    return call


@pytest.fixture
def refused(small_bundle: Path, capsysbinary: Capture) -> Callable[..., None]:
    """refused(arguments, *parts, status=1): stdout stays empty and stderr has the parts, in one line if it is 1."""

    def check(arguments: list[Any], *parts: str, status: int = 1) -> None:
        capsysbinary.readouterr()
        words = [str(small_bundle) if word is BUNDLE else str(word) for word in arguments]
        if status == 1:
            assert main(words) == 1
        else:
            with pytest.raises(SystemExit) as caught:
                main(words)
            assert caught.value.code == status
        out, err = (stream.decode() for stream in capsysbinary.readouterr())
        assert out == ""
        if status == 1:
            assert err.startswith("jinaclip: ") and err.count("\n") == 1, err
        for part in parts:
            assert part in err, f"{part!r} is not in: {err}"

    return check


def parse(content: bytes, form: str) -> tuple[np.ndarray, Records]:
    """Vectors, and all other fields of every row."""
    if form == "npy":
        return np.load(io.BytesIO(content)), []
    if form == "jsonl":
        records = [json.loads(line) for line in content.decode("utf-8").split("\n")[:-1]]
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(io.BytesIO(content))
        records = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
    vectors = [record.pop("embedding") for record in records if "embedding" in record]
    return np.array(vectors, np.float32), records


# Usage


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_every_verb_shows_its_defaults(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    out, err = capsys.readouterr()
    assert caught.value.code == 0 and err == ""
    shown = " ".join(out.split())
    module = VERBS[verb].load()
    assert " ".join(module.__doc__.split()) in shown
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    for action in parser._actions[1:]:
        if action.option_strings and action.help != argparse.SUPPRESS:
            assert action.option_strings[-1] in shown and action.help
            if action.default not in (None, False, []):
                assert f"(default: {action.default})" in shown, action.option_strings


def test_help_lists_every_verb_with_its_purpose() -> None:
    result = run("--help")
    assert result.returncode == 0 and result.stderr == b""
    lines = [line.split(maxsplit=1) for line in result.stdout.decode().partition("verbs:\n")[2].splitlines()]
    assert sorted(VERBS) == [words[0] for words in lines]
    for verb, summary in lines:
        assert (VERBS[verb].load().__doc__ or "").startswith(summary) and len(summary) > 10
    assert run("--version").stdout.decode() == f"jinaclip {version('jinaclip')}\n"


def test_help_needs_no_extra() -> None:
    """The list of verbs imports every verb, also those whose libraries are not installed."""
    of_extras = f"{EXPORT_ONLY},onnxruntime,psutil,matplotlib,starlette,uvicorn,pydantic,orjson,httpx,prometheus_client"
    result = without(of_extras, "--help")
    assert result.returncode == 0 and result.stderr == b""
    assert all(f"\n  {verb} " in result.stdout.decode() for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "the following arguments are required: VERB\n"),
        (["dance"], "invalid choice: 'dance' (choose from "),
        (["encode"], "the following arguments are required: BUNDLE\n"),
        (["encode", "x"], "nothing to encode: give texts, --text-file or --images"),
        (["encode", "x", "text", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["encode", "x", "text", "--precision", "fp64"], "invalid choice: 'fp64' (choose from"),
        (["encode", "x", "text", "--max-length", "long"], "--max-length: invalid int value: 'long'"),
        (["encode", "x", "text", "--format", "npy", "--on-error", "skip"], ".npy cannot record the errors of --on"),
        (["encode", "x", "text", "--output", "x.npy", "--on-error", "skip"], "use --format jsonl or parquet"),
        (["rank", "x", "--texts", "a"], "the following arguments are required: --images"),
        (["rank", "x", "--texts", "a", "--images", "b", "--top", "0"], "--top expects a whole number from 1"),
        (["info"], "the following arguments are required: BUNDLE"),
        (["verify"], "the following arguments are required: BUNDLE"),
        (["export"], "the following arguments are required: --output"),
    ],
    ids=lambda v: " ".join(v)[:30] if isinstance(v, list) else "",
)
def test_wrong_usage_is_2(words: list[str], part: str, refused: Refused) -> None:
    refused(words, part, "usage: jinaclip", status=2)


def test_texts_may_stand_anywhere(encode: Encode, model: ClipModel) -> None:
    task = next(iter(model.tasks))
    expected = model.encode_text(["cat", "-5 °C", "--raw"], task=task, truncate_dim=32)
    for words in (
        ["cat", "-5 °C", "--task", task, "--truncate-dim", "32", "--", "--raw"],
        ["--task", task, "cat", "--truncate-dim", "32", "--", "-5 °C", "--raw"],
    ):
        vectors, records = parse(encode(*words), "jsonl")
        assert [record["text"] for record in records] == ["cat", "-5 °C", "--raw"]
        assert np.abs(vectors - expected).max() <= 1e-6


# encode


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("named", [True, False], ids=["file", "stdout"])
def test_encode_gives_the_models_vectors(
    form: str, named: bool, model: ClipModel, small_bundle: Path, tmp_path: Path, capsysbinary: Capture
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "texts").write_text("\n".join(TEXTS[2:]) + "\n", "utf-8")
    words = ["encode", str(small_bundle), *TEXTS[:2], "--text-file", str(tmp_path / "texts")]
    words += ["--images", *map(str, PHOTOS[:2])]
    output = tmp_path / f"vectors.{form}"
    assert main([*words, "--output", str(output)] if named else [*words, "--format", form]) == 0
    out, err = capsysbinary.readouterr()
    vectors, records = parse(output.read_bytes() if named else out, form)
    assert vectors.dtype == np.float32
    assert np.abs(vectors - np.concatenate([model.encode_text(TEXTS), model.encode_image(PHOTOS[:2])])).max() <= 1e-6
    if form != "npy":
        assert [record.pop("id") for record in records] == [*range(len(TEXTS) + 2)]
        assert {record.pop("provenance") for record in records} == {model.provenance}
        assert records == [{"kind": "text", "text": text} for text in TEXTS] + [
            {"kind": "image", "path": str(path)} for path in PHOTOS[:2]
        ]
    if named:
        assert out == b"" and err.decode() == f"16 vectors of 128 numbers, provenance {model.provenance}\n"
        assert stat.S_IMODE(output.stat().st_mode) == 0o644
    else:
        assert err == b""


def test_the_real_command_keeps_its_streams_apart(small_bundle: Path, model: ClipModel) -> None:
    content = b"a red cat\n" + b"word " * 20
    result = run("encode", small_bundle, "--text-file", "-", "--max-length", 8, input=content)
    vectors, records = parse(result.stdout, "jsonl")
    assert result.returncode == 0
    assert result.stderr.startswith(b"jinaclip: 1 of 2 texts were truncated to max_length=8 tokens (the longest has ")
    assert result.stderr.count(b"\n") == 1
    assert [record["id"] for record in records] == [0, 1]
    expected = model.encode_text(["a red cat", "word " * 20], max_length=8)
    assert np.abs(vectors - expected).max() <= 1e-6


def test_the_format_is_that_of_the_ending_unless_named(encode: Encode, tmp_path: Path) -> None:
    encode("cat", "--output", tmp_path / "a.NPY")
    assert np.load(tmp_path / "a.NPY").shape == (1, 128)
    encode("cat", "--output", tmp_path / "a.txt")
    assert json.loads((tmp_path / "a.txt").read_text())["text"] == "cat"
    encode("cat", "--output", tmp_path / "b.npy", "--format", "jsonl")
    assert json.loads((tmp_path / "b.npy").read_text())["text"] == "cat"
    assert "海".encode() in encode("海")  # readable, not escaped


def test_options_reach_the_model(encode: Encode, model: ClipModel) -> None:
    task = next(iter(model.tasks))
    text, image = "a cup of coffee", PHOTOS[1]
    words = [text, "--images", image, "--truncate-dim", 64, "--raw", "--task", task, "--resize-mode", "squash"]
    vectors, records = parse(encode(*words), "jsonl")
    options: dict[str, Any] = {"truncate_dim": 64, "normalize_embeddings": False}
    assert np.abs(vectors[0] - model.encode_text(text, task=task, **options)).max() <= 1e-6
    assert np.abs(vectors[1] - model.encode_image(image, resize_mode="squash", **options)).max() <= 1e-5
    plain = {record["provenance"] for record in parse(encode(text, "--images", image), "jsonl")[1]}
    assert plain == {model.provenance} and {r["provenance"] for r in records}.isdisjoint(plain)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        (b"one\n\n  \ntwo\n\n", ["one", "", "  ", "two", ""]),
        ("one\u2028two\x0bthree\x85four\n".encode(), ["one\u2028two\x0bthree\x85four"]),
        (b"\n", [""]),
        (b"", []),
    ],
    ids=["plain", "no last newline", "CRLF", "BOM", "blank lines", "other line ends", "one blank", "empty"],
)
@pytest.mark.parametrize("form", FORMATS)
def test_text_files(
    content: bytes, texts: list[str], form: str, encode: Encode, model: ClipModel, tmp_path: Path
) -> None:
    """A line is a row: numbers of the file and of the output agree, blank lines included."""
    if form == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "texts").write_bytes(content)
    vectors, records = parse(encode("--text-file", tmp_path / "texts", "--format", form), form)
    assert len(vectors) == len(texts)
    if form != "npy":
        assert [record["text"] for record in records] == texts
    if texts:
        assert np.abs(vectors - model.encode_text(texts)).max() <= 1e-6
    elif form == "npy":
        assert vectors.shape == (0, 128)


def test_text_files_that_cannot_be_read(refused: Refused, tmp_path: Path) -> None:
    refused(["encode", BUNDLE, "--text-file", tmp_path / "none"], "none: No such file", "one text per line")
    refused(["encode", BUNDLE, "--text-file", tmp_path], "Is a directory")
    (tmp_path / "utf16").write_text("one\ntwo\n", "utf-16")
    refused(["encode", BUNDLE, "--text-file", tmp_path / "utf16"], "utf16 line 1 is not UTF-8 at byte 0; convert")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_bad_line_fails_or_is_skipped(
    form: str, refused: Refused, small_bundle: Path, model: ClipModel, tmp_path: Path, capsysbinary: Capture
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "texts").write_bytes(b"one\nt\xffwo\nthree\n")
    words = ["encode", BUNDLE, "zero", "--text-file", tmp_path / "texts", "--format", form]
    refused(words, "texts line 2 is not UTF-8 at byte 1; convert the file")
    words[1] = small_bundle
    assert main([*map(str, words), "--on-error", "skip"]) == 0
    out, err = capsysbinary.readouterr()
    vectors, records = parse(out, form)
    assert [record.get("text") for record in records] == ["zero", "one", None, "three"]
    assert [record["id"] for record in records] == [0, 1, 2, 3]
    assert "line 2 is not UTF-8 at byte 1" in records[2]["error"]
    assert np.abs(vectors - model.encode_text(["zero", "one", "three"])).max() <= 1e-6
    assert err.startswith(b"3 vectors of 128 numbers, 1 skipped, provenance jc1-") and err.count(b"\n") == 1


def test_words_that_are_not_utf8(small_bundle: Path) -> None:
    result = run("encode", small_bundle, "good", b"b\xffd")
    assert result.returncode == 1 and result.stdout == b""
    assert result.stderr == b"jinaclip: text 'b\\udcffd' is not valid UTF-8; check the terminal's encoding\n"
    result = run("encode", small_bundle, "good", b"b\xffd", "--on-error", "skip")
    assert result.returncode == 0
    assert ["error" in record for record in parse(result.stdout, "jsonl")[1]] == [False, True]


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Three photos in two levels, and what is no photo."""
    top = tmp_path / "gallery"
    (top / "deep/deeper").mkdir(parents=True)
    shutil.copy(PHOTOS[1], top / "b.png")
    shutil.copy(PHOTOS[2], top / "deep/a.PNG")
    shutil.copy(PHOTOS[3], top / "deep/deeper/c.jpg")
    (top / "notes.txt").write_text("no photo")
    (top / "fake.jpg.part").write_text("no photo")
    return top


def test_images_by_name_pattern_and_directory(gallery: Path, encode: Encode, model: ClipModel) -> None:
    def paths(*words: Any) -> list[str]:
        vectors, records = parse(encode("--images", *words), "jsonl")
        found = [record["path"] for record in records]
        assert np.abs(vectors - model.encode_image(found)).max() <= 1e-6
        return [str(Path(path).relative_to(gallery)) for path in found]

    assert paths(gallery) == ["b.png", "deep/a.PNG", "deep/deeper/c.jpg"]
    assert paths(gallery / "*.png") == ["b.png"]
    assert paths(gallery / "**/*.[jp]*g") == ["b.png", "deep/deeper/c.jpg"]
    assert paths(gallery / "deep", gallery / "b.png") == ["deep/a.PNG", "deep/deeper/c.jpg", "b.png"]
    (gallery / "odd[1]*.png").symlink_to(gallery / "b.png")
    assert paths(gallery / "odd[1]*.png") == ["odd[1]*.png"]  # a file of this name goes before the pattern


def test_a_data_uri_is_an_image(encode: Encode, model: ClipModel, refused: Refused) -> None:
    uri = "data:image/png;base64," + base64.b64encode(PHOTOS[1].read_bytes()).decode()
    vectors, (record,) = parse(encode("--images", uri), "jsonl")
    assert record["path"] == "data:"  # not a megabyte of letters
    assert np.abs(vectors[0] - model.encode_image(PHOTOS[1])).max() <= 1e-6


def test_images_that_are_not_there(gallery: Path, refused: Refused) -> None:
    for word in (gallery / "none.png", gallery / "*.webp", gallery / "deep/deeper/none/*"):
        refused(["encode", BUNDLE, "--images", word], f"--images {word}: nothing found", "a file, a directory or a pat")
    (gallery / "empty").mkdir()
    refused(["encode", BUNDLE, "--images", gallery / "empty"], "nothing found; expected images (.avif, .bmp")
    refused(["encode", BUNDLE, "--images", "http://127.0.0.1:1/x.png"], "nothing found")
    refused(["encode", BUNDLE, "--images", "x" * 5000], "--images " + "x" * 200 + "…: nothing found")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_an_unreadable_image_fails_or_is_skipped(
    form: str, gallery: Path, refused: Refused, small_bundle: Path, model: ClipModel, capsysbinary: Capture
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    (gallery / "deep/b.png").write_bytes(PHOTOS[1].read_bytes()[:5000])
    words = ["encode", BUNDLE, "text", "--images", gallery, "--format", form]
    refused(words, "deep/b.png': cannot be read as an image")
    words[1] = small_bundle
    assert main([*map(str, words), "--on-error", "skip"]) == 0
    out, err = capsysbinary.readouterr()
    vectors, records = parse(out, form)
    assert ["error" in record for record in records] == [False, False, False, True, False]
    assert "cannot be read as an image" in records[3]["error"] and records[3]["path"].endswith("deep/b.png")
    good = [record["path"] for record in records if record["kind"] == "image" and "error" not in record]
    assert np.abs(vectors[1:] - model.encode_image(good)).max() <= 1e-6
    assert b"4 vectors of 128 numbers, 1 skipped" in err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--truncate-dim", "100"], ["truncate_dim 100 is not one of", "expected one of 32, 64, 128"]),
        (["--task", "dance"], ["task 'dance' is not supported", "expected None or retrieval.query"]),
        (["--max-length", "1"], ["max_length is 1", "to 8192"]),
        (["--max-length", "99999"], ["max_length is 99999", "to 8192"]),
        (["--precision", "int8"], ["has no int8", "(it has: fp32)"]),
        (["--device", "gpu"], ["device is 'gpu'", "expected auto, cpu, cuda or cuda:N"]),
        (["--backend", "tensorrt", "--device", "cpu"], ["runs on NVIDIA GPUs", "use backend 'onnxruntime'"]),
        (["--threads", "0"], ["threads is 0", "from 1"]),
        (["--output", "/nowhere/at/all.npy"], ["--output /nowhere/at/all.npy", "is not a directory; create it first"]),
        (["--output", "/tmp"], ["--output /tmp is a directory"]),
    ],
    ids=lambda v: " ".join(v)[:30],
)
def test_what_cannot_be_done_is_said_with_what_can(words: list[str], parts: list[str], refused: Refused) -> None:
    refused(["encode", BUNDLE, "cat", *words], *parts)
    if words[0] in ("--truncate-dim", "--precision"):
        refused(["encode", BUNDLE, "--images", PHOTOS[1], *words], *parts)


def test_bundles_that_cannot_be_opened(refused: Refused, small_checkpoint: Path, tmp_path: Path) -> None:
    for verb in ("info", "verify", "encode", "rank"):
        rest = ["cat"] if verb == "encode" else ["--texts", "a", "--images", str(PHOTOS[1])] if verb == "rank" else []
        refused([verb, tmp_path / "none", *rest], "none is not a directory", "made by `jinaclip export`")
        refused([verb, small_checkpoint, *rest], "looks like a checkpoint: run `jinaclip export`")


def test_where_the_output_goes_is_checked_before_the_work(refused: Refused, tmp_path: Path) -> None:
    """Not after hours of encoding: the bundle is not even opened."""
    refused(["encode", tmp_path / "none", "cat", "--output", tmp_path / "nowhere/x.npy"], "nowhere is not a directory")


def test_a_failed_encode_leaves_the_earlier_file(gallery: Path, encode: Encode, refused: Refused) -> None:
    output = gallery.parent / "vectors.jsonl"
    encode("cat", "--output", output)
    before = output.read_bytes()
    (gallery / "deep/b.png").write_bytes(b"broken")
    refused(["encode", BUNDLE, "dog", "--images", gallery, "--output", output], "b.png")
    assert output.read_bytes() == before
    encode("dog", "--output", output)
    assert output.read_bytes() != before
    assert sorted(path.name for path in gallery.parent.iterdir()) == ["gallery", "vectors.jsonl"]


def test_outputs_that_are_no_files_are_written_to(encode: Encode, tmp_path: Path) -> None:
    """Root could put a file in the place of /dev/null; hence a copy of it, not the machine's own."""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        encode("cat", "--output", tmp_path / "pipe")
        assert json.loads(reader.communicate()[0])["text"] == "cat"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    try:
        os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (tmp_path / "null").read_bytes()
    except PermissionError:
        return  # not root, or no devices on this disk: the pipe has shown it
    encode("cat", "--output", tmp_path / "null")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_file_names_need_not_be_utf8(form: str, small_bundle: Path, tmp_path: Path) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(PHOTOS[1], os.fsdecode(name))
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
    result = run("encode", small_bundle, "--images", name, "--format", form, env=strict)
    assert result.returncode == 0 and result.stderr == b""
    _, (record,) = parse(result.stdout, form)
    if form == "jsonl":
        assert os.fsencode(record["path"]) == name
        for more in ([], ["--json"]):
            result = run("rank", small_bundle, "--texts", "a", "--images", name, *more, env=strict)
            assert result.returncode == 0 and b"caf\\udce9.png" in result.stdout and result.stderr == b""
    else:
        assert record["path"].endswith("caf\\xe9.png")


# rank


def test_rank_is_softmax_over_texts_or_images(small_bundle: Path, model: ClipModel, capsysbinary: Capture) -> None:
    texts, images = TEXTS[:4], [str(path) for path in PHOTOS[:3]]
    cosines = model.encode_text(texts).astype(np.float64) @ model.encode_image(images).astype(np.float64).T
    odds = np.exp(cosines * np.exp(model.logit_scale))
    words = ["rank", str(small_bundle), "--texts", *texts, "--images", *images, "--json"]
    for over, queries, candidates in (("texts", images, texts), ("images", texts, images)):
        assert main([*words, "--over", over]) == 0
        out, err = capsysbinary.readouterr()
        assert err == b""
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["query"] for line in lines] == queries
        for row, line in enumerate(lines):
            results = line["results"]
            scores = [result["probability"] for result in results]
            assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-9)
            assert sorted(result["candidate"] for result in results) == sorted(candidates)
            for result in results:
                column = candidates.index(result["candidate"])
                place = (column, row) if over == "texts" else (row, column)
                total = odds[:, row].sum() if over == "texts" else odds[row].sum()
                assert result["cosine"] == pytest.approx(cosines[place], abs=1e-6)
                assert result["probability"] == pytest.approx(odds[place] / total, abs=1e-4)


def test_rank_for_people(small_bundle: Path, capsysbinary: Capture) -> None:
    words = ["rank", str(small_bundle), "--texts", *TEXTS[:4], "--images", str(PHOTOS[1]), "--top", "2"]
    assert main(words) == 0
    out = capsysbinary.readouterr().out.decode().splitlines()
    assert out[0] == str(PHOTOS[1]) and len(out) == 3  # one picture, its two best texts
    best, second = (float(line.split("%")[0]) for line in out[1:])
    assert 100 >= best >= second >= 0 and out[1].endswith(tuple(TEXTS[:4]))


# info, verify


def test_info_tells_what_the_bundle_is(small_bundle: Path, model: ClipModel, capsysbinary: Capture) -> None:
    assert main(["info", str(small_bundle), "--json"]) == 0
    out, err = capsysbinary.readouterr()
    facts = json.loads(out)
    assert err == b"" and out.count(b"\n") == 1
    assert facts["provenance"] == model.provenance and facts["dims"] == [32, 64, 128]
    assert facts["towers"]["text"] == {"layers": 3, "width": 128, "heads": 2, "precisions": ["fp32"]}
    assert facts["max_tokens"] == 8192 and list(facts["tasks"]) == ["retrieval.query"]
    assert facts["image"]["size"] == 140 and facts["logit_scale"] == pytest.approx(2.6592, abs=1e-3)
    assert facts["bytes"] == sum(size for size, _ in model.bundle.files.values())
    assert main(["info", str(small_bundle)]) == 0
    text = capsysbinary.readouterr().out.decode()
    for key in facts:
        assert f"\n{key}" in f"\n{text}"
    assert model.provenance in text


def test_verify_reads_every_byte(small_bundle: Path, tmp_path: Path, refused: Refused, capsysbinary: Capture) -> None:
    bundle = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    assert main(["verify", str(bundle)]) == 0
    out, err = capsysbinary.readouterr()
    files, text, image = out.decode().splitlines()
    assert err == b"" and files.startswith("ok  7 files match their sha256")
    assert text.startswith("ok  text fp32 on onnxruntime: self-test passed, relative error ")
    assert image.startswith("ok  image fp32 on")
    assert main(["verify", str(bundle), "--json"]) == 0
    facts = json.loads(capsysbinary.readouterr().out)
    assert facts["files"] == 7 and [test["tower"] for test in facts["self_tests"]] == ["text", "image"]
    assert all(0 <= test["error_ratio"] <= 0.001 for test in facts["self_tests"])
    refused(["verify", bundle, "--threads", "0"], "threads is 0, expected None or a whole number from 1")
    with (bundle / "image-fp32.onnx.data").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"x")
    refused(["verify", bundle], "image-fp32.onnx.data has sha256 ", "damaged or changed: copy or export")
    os.truncate(bundle / "text-fp32.onnx", 1000)
    refused(["verify", bundle, "--json"], "text-fp32.onnx has 1000 bytes, expected")


# Pipes, signals and streams


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error_to_tell(small_bundle: Path, tmp_path: Path, unbuffered: str) -> None:
    (tmp_path / "texts").write_text("cat\n" * 300)  # half a megabyte of output
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for reader in ("head -1", "true"):
        command = '"$@" | ' + reader + '; echo "${PIPESTATUS[0]}" >&2'
        words = [*COMMAND, "encode", str(small_bundle), "--text-file", str(tmp_path / "texts")]
        shell = ["bash", "-c", command, "bash", *words]
        result = subprocess.run(shell, env=environment, capture_output=True, timeout=60)
        assert result.stderr == b"1\n"  # the status; no traceback
        assert result.stdout.count(b"\n") == (reader != "true")


def test_streams_that_cannot_be_written(small_bundle: Path) -> None:
    with open("/dev/full", "wb") as full:
        for words in [["encode", small_bundle, "cat"], ["info", small_bundle]]:
            result = run(*words, capture_output=False, stdout=full, stderr=subprocess.PIPE)
            assert result.returncode == 1 and result.stderr.count(b"\n") == 1
            assert b"No space left on device" in result.stderr
    command = [*COMMAND, "encode", str(small_bundle), "cat"]
    result = subprocess.run(["bash", "-c", '"$@" >&-', "bash", *command], stderr=subprocess.PIPE, timeout=60)
    assert result.returncode == 1
    assert result.stderr == b"jinaclip: stdout is closed; redirect it to a file or to /dev/null\n"


def test_ctrl_c_ends_an_encode(small_bundle: Path, tmp_path: Path) -> None:
    """While it waits for stdin, and in the middle of minutes of work: 130, one line, at once, and no file."""
    output = tmp_path / "vectors.npy"
    command = [*COMMAND, "encode", str(small_bundle), "--text-file", "-", "--output", str(output)]
    for closed in (False, True):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin
        process.stdin.write((b"word " * 1500 + b"\n") * 300)  # more than a pipe holds: it is reading by now
        process.stdin.flush()
        if closed:
            process.stdin.close()
        time.sleep(1.5 if closed else 0.3)
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert time.monotonic() - start < 5
        assert process.stdout and process.stderr
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"jinaclip: interrupted\n")
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
        assert [*tmp_path.iterdir()] == []


# What need not be installed, and what is left alone

HIDING = """
    import sys
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in HIDDEN:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    HIDDEN = set(sys.argv.pop(1).split(","))
    sys.meta_path.insert(0, Hide())
    from jinaclip.cli import main
    sys.exit(main())
"""


def without(modules: str, *words: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command where these modules are not installed."""
    command = [sys.executable, "-c", textwrap.dedent(HIDING), modules, *map(str, words)]
    return subprocess.run(command, **{"capture_output": True, "timeout": 60, **options})


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        ("torch", "export CHECKPOINT --output OUT", "export needs torch; run: pip install 'jinaclip[export]'"),
        ("onnx", "export --random small --output OUT", "export needs onnx; run: pip install 'jinaclip[export]'"),
        ("huggingface_hub", "export no/such --output OUT", "export needs huggingface_hub; run: pip install"),
        ("onnxruntime", "encode BUNDLE cat", "onnxruntime is not installed; run: pip install 'jinaclip[cpu]'"),
        ("onnxruntime", "verify BUNDLE", "onnxruntime is not installed; run: pip install 'jinaclip[cpu]'"),
        ("pyarrow", "encode nowhere cat --format parquet", "encode needs pyarrow; run: pip install 'jinaclip[bulk]'"),
    ],
    ids=lambda v: v.split()[0],
)
def test_a_missing_extra_is_named(
    module: str, words: str, message: str, small_bundle: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    places = {"BUNDLE": small_bundle, "CHECKPOINT": small_checkpoint, "OUT": tmp_path / "out"}
    result = without(module, *(places.get(word, word) for word in words.split()))
    assert result.returncode == 1 and result.stdout == b""
    assert result.stderr.decode().startswith(f"jinaclip: {message}") and result.stderr.count(b"\n") == 1
    assert [*tmp_path.iterdir()] == []


EXPORT_ONLY = "torch,torchvision,onnx,onnxscript,onnx_ir,transformers,timm,safetensors,huggingface_hub,skimage,pyarrow"


def test_serving_needs_nothing_of_the_exporter(small_bundle: Path, model: ClipModel, tmp_path: Path) -> None:
    """Not installed at all: text, images, rank, verify, info work, and every --help."""
    (tmp_path / "photo.png").symlink_to(PHOTOS[1])
    result = without(EXPORT_ONLY, "encode", small_bundle, "cat", "--images", tmp_path)
    assert result.returncode == 0 and result.stderr == b""
    vectors, _ = parse(result.stdout, "jsonl")
    assert np.abs(vectors - [model.encode_text("cat"), model.encode_image(PHOTOS[1])]).max() <= 1e-6
    assert without(EXPORT_ONLY, "rank", small_bundle, "--texts", "a", "--images", tmp_path).returncode == 0
    assert without(EXPORT_ONLY, "verify", small_bundle).returncode == 0
    assert without(f"{EXPORT_ONLY},onnxruntime", "info", small_bundle).returncode == 0
    for verb in ("export", "bench"):
        result = without(f"{EXPORT_ONLY},onnxruntime,psutil", verb, "--help")
        assert result.returncode == 0 and result.stderr == b"", verb


def test_imports_are_light(small_bundle: Path) -> None:
    """Installed or not, the exporter's libraries are never imported: they would cost seconds and gigabytes."""
    script = f"""
        import sys
        import jinaclip
        at_import = set(sys.modules)
        from jinaclip.cli import main
        assert main(["encode", {str(small_bundle)!r}, "cat", "--images", {str(PHOTOS[1])!r}]) == 0
        heavy = {set(EXPORT_ONLY.split(","))!r} | {{"jinaclip_export", "jinaclip_engines", "jinaclip_bench"}}
        print(*sorted(heavy & set(sys.modules)), file=sys.stderr)
        print(*sorted({{"onnxruntime", "tokenizers"}} & at_import), file=sys.stderr)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"\n\n")


RAW_SESSION = """
    import sys
    import numpy, onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    session.run(None, {"input_ids": numpy.full((1, 3), 9)})
"""
ONE_THREAD = """
    import os, sys
    from jinaclip import ClipModel
    with ClipModel(sys.argv[1], threads=1) as model:
        model.encode_text(["cat", "dog"])
        print(len(os.listdir("/proc/self/task")))
"""


def left_in(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))


def test_nothing_is_written_at_home(fresh_home: dict[str, str], small_bundle: Path) -> None:
    home = Path(fresh_home["HOME"])
    result = run("encode", small_bundle, "cat", "--images", PHOTOS[1], env=fresh_home)
    assert result.returncode == 0
    assert left_in(home) == []
    # Without the variable that jinaclip sets, this onnxruntime does write there: the line above can fail.
    command = [sys.executable, "-c", textwrap.dedent(RAW_SESSION), str(small_bundle / "text-fp32.onnx")]
    subprocess.run(command, env=fresh_home, check=True, timeout=60)
    if left_in(home) == []:
        pytest.skip("this onnxruntime has no telemetry to switch off")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_one_thread_is_one_thread(fresh_home: dict[str, str], small_bundle: Path) -> None:
    """No telemetry thread, no pool: what threads=1 promises to a host that counts its cores."""
    environment = fresh_home | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(ONE_THREAD), str(small_bundle)]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert (result.stdout, result.stderr) == (b"1\n", b"")
