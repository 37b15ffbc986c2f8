"""The parts of tests/trained on small inputs of the same form as the packages, which `make trained` downloads."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu
from jinaclip.bundle.manifest import Bundle
from jinaclip.encoders import TextEncoder
from jinaclip.preprocessing.text import TextTokenizer
from jinaclip_engines.onnxruntime.prepare import prepare
from jinaclip_export.bundle.manifest import Identity, special_ids
from jinaclip_export.bundle.writer import export_bundle
from tests.trained import fetch, inputs
from tests.trained.bert import bert_reference, bert_tower
from tests.trained.e5 import GROUP, LAYERS, E5File, dequantised, read_file, tokenizer
from tests.trained.mapped import WIDTH, MappedModel
from tests.trained.minilm import with_renamed_tokens

PO = r"""
msgid ""
msgstr "Language: de\n"

#: file.py:1
msgid "Add"
msgstr "Hinzufügen"

msgctxt "month"
msgid ""
"A long \"text\" "
"on two lines"
msgstr ""
"Ein langer \"Text\" "
"in zwei Zeilen"

#, fuzzy
msgid "Guess"
msgstr "Geraten"

#, python-format
msgid "%s left"
msgstr "%s übrig"

msgid "One"
msgid_plural "Many"
msgstr[0] "Eins"
msgstr[1] "Viele"

msgid "Untranslated"
msgstr ""

#~ msgid "Old"
#~ msgstr "Alt"
"""
VOCABULARY = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "▁a", "▁ab", "<mask>"]
POSITIONS, TYPES, LAYER_COUNT, HEADS, INNER = 16, 2, 2, 12, 2 * WIDTH


def test_messages_of_a_po_file() -> None:
    assert list(inputs.messages(PO)) == ["Hinzufügen", 'Ein langer "Text" in zwei Zeilen', "%s übrig"]


def test_sentences_have_no_placeholders_and_a_length() -> None:
    assert inputs.sentence("  Please enter\n a correct value. ") == "Please enter a correct value."
    for text in (
        "Add",
        "%(name)s is not a valid value.",
        "Use {} as the value of this.",
        "See <a> for the value of it.",
    ):
        assert inputs.sentence(text) is None


def test_captions_by_language() -> None:
    content = "A fly.\nde.utf8=Eine Fliege.\nde_AT.utf8=Fliege\nfr.utf8=  \n"
    found = {language: list(inputs.captions(content, language)) for language in ("en", "de", "fr", "ja")}
    assert found == {"en": ["A fly."], "de": ["Eine Fliege."], "fr": [], "ja": []}


def test_first_paragraphs_of_docstrings() -> None:
    source = '"""One."""\nclass A:\n    """Two\n    lines.\n\n    More."""\n    def b(self): ...\n'
    assert [text for text in inputs.docstrings(source) if text] == ["One.", "Two\nlines."]


def test_a_source_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda command: None)
    with pytest.raises(fetch.FetchError, match="no command apt-get; unpack Debian's package tuxpaint-stamps-default"):
        fetch.stamps()
    monkeypatch.setitem(fetch.WHEELS, "django", "no such requirement")
    with pytest.raises(fetch.FetchError, match="no such requirement cannot be downloaded here"):
        fetch.wheel("django")
    assert not list((tmp_path / "jinaclip/trained").iterdir())


def test_special_tokens_are_renamed_as_keys_and_as_values() -> None:
    content = {"vocab": {"[CLS]": 1, "cat": 2}, "added": [{"content": "[SEP]", "special": True}]}
    assert with_renamed_tokens(content) == {
        "vocab": {"<s>": 1, "cat": 2},
        "added": [{"content": "</s>", "special": True}],
    }


def groups(numbers: np.ndarray, scales: np.ndarray) -> bytes:
    """The groups of 4-bit numbers [n, 32] with scales [n]: what `dequantised` reads."""
    half = GROUP // 2
    halves = numbers[:, :half] | numbers[:, half:] << 4
    return b"".join(s.tobytes() + row.tobytes() for s, row in zip(scales.astype("<f2"), halves, strict=True))


def test_groups_are_dequantised() -> None:
    numbers = np.arange(2 * GROUP, dtype=np.uint8).reshape(2, GROUP) % 16
    values = dequantised(groups(numbers, np.array([0.5, 2.0])))
    expected = (numbers.astype(np.float32) - 8) * np.array([[0.5], [2.0]], np.float32)
    np.testing.assert_array_equal(values, expected.ravel())


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of E5's, with random weights."""
    rng = np.random.default_rng(0)
    tensors: dict[str, tuple[bool, int, bytes]] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        count = rows * columns // GROUP
        numbers = rng.integers(0, 16, (count, GROUP), dtype=np.uint8)
        tensors[name] = True, rows * columns, groups(numbers, rng.uniform(0.002, 0.01, count))

    def vector(name: str, size: int, mean: float) -> None:
        tensors[name] = False, size, (mean + 0.1 * rng.standard_normal(size)).astype("<f4").tobytes()

    matrix("emb.word", len(VOCABULARY) + 1, WIDTH)
    for name, size in (("emb.pos", POSITIONS * WIDTH), ("emb.type", TYPES * WIDTH), ("emb.ln.b", WIDTH)):
        vector(name, size, 0)
    vector("emb.ln.w", WIDTH, 1)
    for block in range(LAYER_COUNT):
        for part in LAYERS:
            rows, columns = {"fi": (INNER, WIDTH), "fo": (WIDTH, INNER)}.get(part, (WIDTH, WIDTH))
            if part.endswith("ln"):
                vector(f"l{block}.{part}.w", WIDTH, 1)
            else:
                matrix(f"l{block}.{part}.w", rows, columns)
            vector(f"l{block}.{part}.b", rows, 0)
    pieces = [piece.encode() for piece in VOCABULARY]
    sizes = (WIDTH, LAYER_COUNT, HEADS, INNER, len(VOCABULARY) + 1, POSITIONS, TYPES)
    head = b"E5S1" + struct.pack("<I7ifi5iQ", 1, *sizes, 1e-12, GROUP, len(pieces), 0, 2, 1, 3, sum(map(len, pieces)))
    head += np.cumsum([0, *map(len, pieces)], dtype="<u4").tobytes()
    head += np.linspace(0, -5, len(pieces), dtype="<f4").tobytes() + b"".join(pieces)
    head += struct.pack("<iI", 1, 9) + struct.pack("<IBI", 9, 1, 32) + struct.pack("<i", len(tensors))
    start = len(head) + sum(2 + len(name) + 21 for name in tensors)
    content = b""
    for name, (quantised, count, data) in tensors.items():
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", quantised, count, start + len(content), len(data))
        content += data
    path = tmp_path_factory.mktemp("e5") / "small.bin"
    path.write_bytes(head + content)
    return path


def test_the_e5_file_is_read(small_file: Path, tmp_path: Path) -> None:
    file = read_file(small_file)
    config = file.config
    assert (config.hidden_size, config.num_hidden_layers, config.max_tokens) == (WIDTH, LAYER_COUNT, POSITIONS)
    assert (config.layer_norm_eps, special_ids(config), file.unknown) == (1e-12, {"bos": 0, "pad": 1, "eos": 2}, 3)
    assert [piece for piece, _ in file.pieces] == VOCABULARY
    assert file.weights["encoder.layer.1.output.dense.weight"].shape == (WIDTH, INNER)
    tokenizer(file).save(str(tmp_path / "tokenizer.json"))
    made = TextTokenizer(tmp_path / "tokenizer.json", vocab_size=config.vocab_size, special_ids=special_ids(config))
    assert made.encode(["ab  a", "z"]) == [[0, 8, 7, 2], [0, 4, 3, 2]]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.bin").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"other.bin starts with b'GGUF', expected b'E5S1'"):
        read_file(tmp_path / "other.bin")


@pytest.fixture(scope="module")
def small_e5(small_file: Path) -> E5File:
    return read_file(small_file)


def test_the_mapped_tower_is_transformers_bert(small_e5: E5File) -> None:
    ids = torch.tensor([[0, 5, 6, 8, 4, 2], [0, 7, 2, 1, 1, 1]])  # the second text is padded
    tower, reference = (make(small_e5.weights, small_e5.config) for make in (bert_tower, bert_reference))
    with torch.inference_mode():
        found, expected = (torch.nn.functional.normalize(side(ids), dim=-1) for side in (tower, reference))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # float32, summed in another order


def test_a_mapped_model_becomes_a_bundle_and_a_prepared_graph(
    small_e5: E5File, small_file: Path, tmp_path: Path
) -> None:
    """The passes for CPUs keep the learned positions, also in a batch with padding, which these passes remove."""
    tower = bert_tower(small_e5.weights, small_e5.config)
    tokenizer(small_e5).save(str(tmp_path / "tokenizer.json"))
    model = MappedModel("small", tmp_path, small_file, text=tower)
    export_bundle(model, tmp_path / "bundle", identity=Identity("small"), towers=["text"], precisions=["fp32", "int8"])
    bundle = Bundle(tmp_path / "bundle")
    for precision, tolerance in (("fp32", 1e-6), ("int8", 0.05)):
        prepare(bundle, "text", precision)
        session, reason = OnnxRuntimeCpu().open(bundle, "text", precision)
        assert reason.startswith("prepared graph")
        rows = TextEncoder(bundle, precision, session).run([[0, 5, 6, 8, 4, 2], [0, 7, 2]])
        with torch.inference_mode():
            expected = torch.cat([tower(torch.tensor([row])) for row in ([0, 5, 6, 8, 4, 2], [0, 7, 2])]).numpy()
        scale = np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(rows / scale, expected / scale, atol=tolerance)
        session.close()
