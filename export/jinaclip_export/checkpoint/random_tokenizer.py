"""Generate a tokenizer in the published format, for random checkpoints without a tokenizer file.

It is Unigram over Metaspace with the published special tokens and template. Its pieces are single characters of the
larger scripts, common words, and Latin letter groups up to the vocabulary's size. Text in many languages therefore gets
distinct ids, and the embedding table has a realistic size. The normaliser is NFKC, because the published tokenizer's
normaliser table is part of its file.
"""

from __future__ import annotations

import itertools
import json
import string
import unicodedata
from collections.abc import Iterator
from typing import Any

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
MASK_TOKEN = "<mask>"  # the last id of the vocabulary, as published

# First and last code point of each script whose characters are pieces, most used first.
_SCRIPTS = """
0021-007E 00A1-024F 0370-03FF 0400-04FF 0590-05FF 0600-06FF 0900-097F 0980-09FF 0B80-0BFF 0C00-0C7F 0E00-0E7F 10A0-10FF
1E00-1EFF 2010-205E 20A0-20BF 3001-303F 3041-30FF 4E00-9FFF AC00-D7A3 1F300-1F64F
""".split()
_WORDS = """
the of and to in is a that for it on with as was at by an be this are from or have not they which one you were
all we there can more if no man out so up said what its about than into them only time some could these two may
first then do any like my now over such our even most me after also did many before through back years where
much your way well down should because each just those people how too little state good very make world still
see men work long get here between both life being under never day same another know while last might us great
old year off come since against go came right used take three beautiful sunset beach photo picture image cat dog
cup coffee rocket woman space man camera represent query retrieving evidence documents
de la que el en y los se del las un por con una su para es al lo como más pero sus le ya este sí porque esta
le et les des du une dans qui pour sur pas au plus par avec son der die und den von zu das mit sich des auf für
ist im dem nicht ein eine als auch es an werden aus er hat dass sie nach wird bei einer um am sind noch wie
и в не на что с по как это из к но у за от о для его был было бы или так же все они
""".split()

# With fewer ids most characters would not fit, and texts would become sequences of <unk>.
MIN_VOCABULARY = 256


def random_tokenizer(vocab_size: int) -> str:
    """Content of a tokenizer.json with exactly `vocab_size` ids.

    Args:
        vocab_size: number of ids, at least MIN_VOCABULARY.

    Raises:
        ValueError: `vocab_size` is too small.
    """
    if vocab_size < MIN_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}; a generated tokenizer needs at least {MIN_VOCABULARY} ids")
    ordinary = itertools.islice(_pieces(), vocab_size - len(SPECIAL_TOKENS) - 1)
    vocabulary: list[tuple[str, float]] = [(token, 0.0) for token in SPECIAL_TOKENS]
    # Every piece scores about -10, so one long piece scores higher than the several pieces it could be split into.
    vocabulary += [(piece, -10.0 - index * 1e-5) for index, piece in enumerate(ordinary)]
    vocabulary.append((MASK_TOKEN, 0.0))
    specials = [*enumerate(SPECIAL_TOKENS), (vocab_size - 1, MASK_TOKEN)]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": token == MASK_TOKEN,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, token in specials
        ],
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            ],
        },
        "post_processor": _post_processor(),
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary, "byte_fallback": False},
    }
    return json.dumps(document, ensure_ascii=False)


def _post_processor() -> dict[str, Any]:
    """Puts one text, or a pair, between special tokens."""
    start, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>"))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    return {
        "type": "TemplateProcessing",
        "single": [start, first, end],
        "pair": [start, first, end, end, second, end],
        "special_tokens": {
            token: {"id": token, "ids": [index], "tokens": [token]}
            for index, token in enumerate(SPECIAL_TOKENS)
            if token in ("<s>", "</s>")
        },
    }


def _pieces() -> Iterator[str]:
    """An endless sequence of distinct pieces, most useful first."""
    seen: set[str] = set()
    letters = string.ascii_lowercase
    groups = ("".join(group) for size in itertools.count(3) for group in itertools.product(letters, repeat=size))
    start = ("▁", *("▁" + letter for letter in letters), *letters)
    words = ("▁" + word for word in _WORDS)
    for piece in itertools.chain(start, _characters(0, 4), words, _characters(4, len(_SCRIPTS)), groups):
        if piece not in seen:
            seen.add(piece)
            yield piece


def _characters(first: int, last: int) -> Iterator[str]:
    for script in _SCRIPTS[first:last]:
        low, high = script.split("-")
        for code in range(int(low, 16), int(high, 16) + 1):
            character = chr(code)
            # A character that NFKC rewrites would never be looked up in the vocabulary.
            if unicodedata.normalize("NFKC", character) == character:
                yield character
