"""Texts of wanted lengths: strings that the bundle's own tokenizer turns into exactly so many tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np

from jinaclip.bundle.manifest import Bundle
from jinaclip.preprocessing.text import TextTokenizer
from jinaclip_bench.cases.table import Case
from jinaclip_bench.errors import BenchError

SHORTEST = 3  # <s>, a word, </s>
_WORDS = 4000  # different ones, at most


def log_normal_lengths(rows: int, median: int, sigma: float, longest: int) -> list[int]:
    """Token counts, log-normal around `median`, cut to [SHORTEST, longest], in an order that is no order.

    They are the distribution's quantiles at (i + ½) / rows and not draws from it: the same mix whatever the seed.
    """
    normal = NormalDist(np.log(median), sigma)
    exact = np.exp([normal.inv_cdf((i + 0.5) / rows) for i in range(rows)])
    lengths = exact.round().astype(int).clip(SHORTEST, longest)
    return [int(n) for n in np.random.default_rng(0).permutation(lengths)]


def lengths_of(case: Case) -> list[int]:
    """Token counts of a case whose texts are a mix."""
    assert case.median is not None and case.sigma is not None and case.tokens is not None  # the table of cases
    return log_normal_lengths(case.rows, case.median, case.sigma, case.tokens)


def texts_of(bundle: Bundle, tokenizer: TextTokenizer, lengths: Sequence[int]) -> list[str]:
    """A text of each length in tokens, `<s>` and `</s>` included; the same every time.

    Its words are pieces of the vocabulary, each one token. Their characters vary little over a long text, so
    that sorting by characters sorts by tokens: the publisher's path at its best.

    Raises:
        BenchError: the model takes no text this long, or the tokenizer has no such words.
    """
    if max(lengths) > bundle.max_tokens:
        raise BenchError(
            f"the model takes texts of at most {bundle.max_tokens} tokens, this case has one of {max(lengths)}; "
            "leave the case out"
        )
    words = _words(bundle.tokenizer, tokenizer)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, length - 2)) for length in lengths]
    found = [len(ids) for ids in tokenizer.encode(texts)]
    if found != list(lengths):
        raise BenchError(
            f"{bundle.tokenizer} makes texts of {found[:8]}… tokens where {list(lengths[:8])}… were wanted; "
            "expected words that stay one token each between blanks"
        )
    return texts


def _words(path: Path, tokenizer: TextTokenizer) -> list[str]:
    """Words of at least two letters that are one token each; the same every time."""
    vocabulary = json.loads(path.read_text("utf-8"))["model"]["vocab"]
    pieces = [entry[0] for entry in vocabulary] if isinstance(vocabulary, list) else list(vocabulary)
    candidates = [p[1:] for p in pieces if p.startswith("▁") and len(p) > 2 and p[1:].isalpha()]
    chosen = [str(word) for word in np.random.default_rng(0).permutation(candidates)[:_WORDS]]
    words = [word for word, ids in zip(chosen, tokenizer.encode(chosen), strict=True) if len(ids) == SHORTEST]
    if not words:
        raise BenchError(f"{path} has no words of one token; expected a tokenizer with pieces that start with ▁")
    return words
