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
_SCRIPTS = (
    (0x0021, 0x007E), (0x00A1, 0x024F), (0x0370, 0x03FF), (0x0400, 0x04FF), (0x0590, 0x05FF),
    (0x0600, 0x06FF), (0x0900, 0x097F), (0x0980, 0x09FF), (0x0B80, 0x0BFF), (0x0C00, 0x0C7F),
    (0x0E00, 0x0E7F), (0x10A0, 0x10FF), (0x1E00, 0x1EFF), (0x2010, 0x205E), (0x20A0, 0x20BF),
    (0x3001, 0x303F), (0x3041, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F),
)  # fmt: skip
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
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
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
    for low, high in _SCRIPTS[first:last]:
        for code in range(low, high + 1):
            character = chr(code)
            # A character that NFKC rewrites would never be looked up in the vocabulary.
            if unicodedata.normalize("NFKC", character) == character:
                yield character
