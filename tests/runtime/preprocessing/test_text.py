"""Tokens as the tokenizers library and transformers give them: specials, cuts, padding, hostile texts."""

from __future__ import annotations

import logging
import os
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from jinaclip import InputError
from jinaclip.bundle.manifest import Bundle
from jinaclip.preprocessing.text import TextTokenizer, instruction_of
from tests.conftest import TEXTS

HOSTILE = [
    "", " ", "\n\t\r\n", "\0", "a\0b", "</s>", "<s>", "<pad>", "x<pad>y", "<mask>", "a <mask> b", "<unk>", "<s></s>",
    "\u200b\u200d\ufeff",
    "e\u0301" * 30, "👩‍👩‍👧‍👦🏳️‍🌈", "ﷺ", "\u202eabc", "Ａ" * 50, "\U0010ffff", "a" * 5000, "漢" * 3000,
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(small_bundle: Path) -> TextTokenizer:
    bundle = Bundle(small_bundle)
    return bundle.open_tokenizer()


@pytest.fixture(scope="module")
def published() -> TextTokenizer:
    """The 250,002-piece tokenizer, where there is one."""
    path = os.environ.get("JINACLIP_TOKENIZER")
    if not path:
        pytest.skip("THE 250,002-PIECE TOKENIZER IS NOT TESTED: set JINACLIP_TOKENIZER to its tokenizer.json")
    return TextTokenizer(Path(path), vocab_size=250002, special_ids={"bos": 0, "pad": 1, "eos": 2})


def test_ids_are_those_of_the_library(tokenizer: TextTokenizer, small_bundle: Path) -> None:
    reference = Tokenizer.from_file(str(small_bundle / "tokenizer.json"))
    for text in TEXTS + HOSTILE:
        assert tokenizer.encode([text]) == [reference.encode(text).ids], text


def test_distinct_texts_have_distinct_ids(tokenizer: TextTokenizer) -> None:
    """The stand-in tokenizer covers the scripts of the tests: nothing collapses into <unk>."""
    ids = tokenizer.encode(TEXTS)
    assert len({tuple(row) for row in ids}) == len(TEXTS)
    assert sum(row.count(3) for row in ids) == 0


def test_empty_text_is_bos_eos(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode([""]) == [[0, 2]]


def test_literal_special_tokens_are_special_as_published(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode(["</s>", "<pad>", "<s>"]) == [[0, 2, 2], [0, 1, 2], [0, 0, 2]]


@pytest.mark.parametrize("limit", [3, 4, 8, 77])
def test_cut_rows_are_those_of_the_library(tokenizer: TextTokenizer, small_bundle: Path, limit: int) -> None:
    reference = Tokenizer.from_file(str(small_bundle / "tokenizer.json"))
    reference.enable_truncation(limit)
    texts = TEXTS + HOSTILE
    found = tokenizer.truncated(tokenizer.encode(texts), limit)
    assert found == [reference.encode(text).ids for text in texts]


def test_one_warning_tells_how_many_were_cut(tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "jinaclip"):
        tokenizer.truncated([[0, 5, 2], [0, 5, 6, 7, 2], [0, 5, 6, 7, 8, 2]], 4)
        tokenizer.truncated([[0, 2]], 4)
    assert caplog.messages == ["2 of 3 texts were truncated to max_length=4 tokens (the longest has 6)"]


def test_padding_is_on_the_right(tokenizer: TextTokenizer) -> None:
    batch = tokenizer.padded([[0, 5, 2], [0, 2]])
    assert batch.dtype == np.int64
    assert batch.tolist() == [[0, 5, 2], [0, 2, 1]]


@pytest.mark.parametrize(("text", "found"), [("a\ud800b", "U+D800 at position 1"), (7, "is a int"), (None, "NoneType")])
def test_what_is_no_text_is_named(tokenizer: TextTokenizer, text: str, found: str) -> None:
    with pytest.raises(InputError, match="text 1 ") as caught:
        tokenizer.encode(["fine", text])
    assert found.replace("U+", "U+") in str(caught.value)
    assert caught.value.index == 1


def test_instructions() -> None:
    tasks = {"retrieval.query": "Represent: "}
    assert instruction_of(None, tasks, None) == ""
    assert instruction_of("retrieval.query", tasks, None) == "Represent: "
    assert instruction_of(None, tasks, "retrieval.query") == "Represent: "
    with pytest.raises(InputError, match=r"task 'retrieval.passage' .* None or retrieval\.query"):
        instruction_of("retrieval.passage", tasks, None)


def test_published_tokenizer_against_transformers(published: TextTokenizer) -> None:
    """Differential: 4,000 texts of tests, assigned code points and special tokens against transformers' own call."""
    from tests.support.references import import_references

    import_references()
    from transformers import PreTrainedTokenizerFast

    reference: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=os.environ["JINACLIP_TOKENIZER"], bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip
    rng = random.Random(0)
    assigned = [c for c in map(chr, range(0x20, 0x1FFFF)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    words = [word for text in TEXTS + HOSTILE for word in text.split()]
    texts = TEXTS + HOSTILE
    texts += ["".join(rng.choices(assigned, k=rng.randint(1, 30))) for _ in range(2000)]
    texts += [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(2000)]
    found = published.encode(texts)
    assert found == reference(texts)["input_ids"]
    for limit in (3, 8, 77, 512):
        cut = reference(texts[:300], truncation=True, max_length=limit)["input_ids"]
        assert published.truncated(found[:300], limit) == cut


def test_published_tokenizer_counts(published: TextTokenizer) -> None:
    """Known counts of the hosted API for this tokenizer."""
    assert len(published.encode(["Hello, world!"])[0]) == 6


def test_tokenizers_never_starts_threads_of_its_own(small_bundle: Path) -> None:
    """A pool of threads that the host did not ask for also prints a warning after a fork."""
    import subprocess

    script = (
        "import os, sys\nfrom jinaclip import ClipModel\n"
        f"m = ClipModel({str(small_bundle)!r}, towers=('text',), threads=1)\n"
        "m.encode_text(['a b c'] * 500)\n"
        "print(len(os.listdir('/proc/self/task')))\n"
        "if os.fork() == 0: os._exit(0)\nos.wait()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stderr == ""
    assert int(done.stdout) <= 2  # the main thread, and one that waits for Ctrl-C during a long run
