"""Generate texts that the bundle's tokenizer encodes to given numbers of tokens."""

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
_WORDS = 4000  # largest number of different words


def log_normal_lengths(rows: int, median: int, sigma: float, longest: int) -> list[int]:
    """Token counts with a log-normal distribution around `median`, limited to [SHORTEST, longest], in random order.

    They are the distribution's quantiles at (i + ½) / rows, not random samples, so the mix does not depend on a seed.
    """
    normal = NormalDist(np.log(median), sigma)
    exact = np.exp([normal.inv_cdf((i + 0.5) / rows) for i in range(rows)])
    lengths = exact.round().astype(int).clip(SHORTEST, longest)
    return [int(n) for n in np.random.default_rng(0).permutation(lengths)]


def lengths_of(case: Case) -> list[int]:
    """Token counts of a case with texts of mixed lengths."""
    assert case.median is not None and case.sigma is not None and case.tokens is not None  # the table of cases
    return log_normal_lengths(case.rows, case.median, case.sigma, case.tokens)


def texts_of(bundle: Bundle, tokenizer: TextTokenizer, lengths: Sequence[int]) -> list[str]:
    """One text for each length in tokens, `<s>` and `</s>` included. The texts are the same in every run.

    The words are pieces of the vocabulary, one token each. Over a long text their average length varies little, so
    sorting by characters also sorts by tokens, which is the best case for the publisher's implementation.

    Raises:
        BenchError: a text is longer than the model supports, or the tokenizer has no such words.
    """
    if max(lengths) > bundle.max_tokens:
        raise BenchError(
            f"the model supports texts of at most {bundle.max_tokens} tokens, but this case has one of {max(lengths)}; "
            "remove the case"
        )
    words = _words(bundle.tokenizer, tokenizer)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, length - 2)) for length in lengths]
    found = [len(ids) for ids in tokenizer.encode(texts)]
    if found != list(lengths):
        raise BenchError(
            f"{bundle.tokenizer} encodes the texts to {found[:8]}… tokens, expected {list(lengths[:8])}…; "
            "expected a tokenizer that encodes each word separately"
        )
    return texts


def _words(path: Path, tokenizer: TextTokenizer) -> list[str]:
    """Words of at least two letters that are one token each. They are the same in every run."""
    vocabulary = json.loads(path.read_text("utf-8"))["model"]["vocab"]
    pieces = [entry[0] for entry in vocabulary] if isinstance(vocabulary, list) else list(vocabulary)
    candidates = [p[1:] for p in pieces if p.startswith("▁") and len(p) > 2 and p[1:].isalpha()]
    chosen = [str(word) for word in np.random.default_rng(0).permutation(candidates)[:_WORDS]]
    words = [word for word, ids in zip(chosen, tokenizer.encode(chosen), strict=True) if len(ids) == SHORTEST]
    if not words:
        raise BenchError(f"{path} has no words of one token; expected a tokenizer whose pieces start with ▁")
    return words
