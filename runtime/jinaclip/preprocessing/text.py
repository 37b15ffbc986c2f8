"""Texts to token ids, as the published tokenizer.json says: `<s> … </s>`, literal special tokens included."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.errors import BundleError, InputError

logger = logging.getLogger("jinaclip")

SPECIAL_TOKENS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>"}


class TextTokenizer:
    """A tokenizer.json, checked against the text tower it feeds.

    Args:
        path: the tokenizer.json.
        vocab_size: rows of the embedding table.
        special_ids: ids that the tower expects for bos, pad and eos.

    Raises:
        BundleError: not a tokenizer file, or its ids do not fit the tower.
    """

    def __init__(self, path: Path, *, vocab_size: int, special_ids: Mapping[str, int]) -> None:
        # Set before the import: one text at a time is quicker than the model, and a pool of threads that the
        # host did not ask for prints a warning after a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{path} is not a readable tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocab_size:
            raise BundleError(
                f"{path} has ids up to {largest}, but the text tower's embedding table has {vocab_size} rows; "
                "expected the tokenizer of the same checkpoint"
            )
        for name, token in SPECIAL_TOKENS.items():
            found = self._tokenizer.token_to_id(token)
            if found != special_ids[name]:
                raise BundleError(
                    f"{path} has {'no' if found is None else f'id {found} for'} {token}, the text tower expects "
                    f"{special_ids[name]}; expected the tokenizer of the same checkpoint"
                )
        self.bos, self.pad, self.eos = (special_ids[name] for name in ("bos", "pad", "eos"))
        empty = self.encode([""])[0]
        if empty != [self.bos, self.eos]:
            raise BundleError(f"{path} turns an empty text into {empty}, expected {[self.bos, self.eos]}")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, special tokens included, at their full length.

        Raises:
            InputError: an item is not a str or holds half a character (a lone surrogate); names its index.
        """
        result = []
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {index} is a {type(text).__name__}, expected str", index=index)
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(
                    f"text {index} holds the lone surrogate U+{ord(text[error.start]):04X} at character "
                    f"{error.start}, which is no character; decode the text with errors='replace' first",
                    index=index,
                ) from None
            result.append(self._tokenizer.encode(text).ids)
        return result

    def truncated(self, ids: Sequence[list[int]], max_length: int) -> list[list[int]]:
        """Each row cut to `max_length` ids and closed with `</s>`; one warning a call says how many were cut."""
        over = [len(row) for row in ids if len(row) > max_length]
        if over:
            logger.warning(
                "%d of %d texts were cut to max_length=%d tokens (the longest has %d)",
                len(over), len(ids), max_length, max(over),
            )  # fmt: skip
        return [[*row[: max_length - 1], self.eos] if len(row) > max_length else row for row in ids]

    def padded(self, ids: Sequence[list[int]]) -> np.ndarray:
        """Rows as int64 [B, T], padded on the right to the longest."""
        batch = np.full((len(ids), max(map(len, ids))), self.pad, np.int64)
        for row, tokens in zip(batch, ids, strict=True):
            row[: len(tokens)] = tokens
        return batch


def instruction_of(task: str | None, tasks: Mapping[str, str], default: str | None) -> str:
    """The sentence to put before every text; empty for none.

    Raises:
        InputError: the model has no such task; the message lists its own.
    """
    task = default if task is None else task
    if task is None:
        return ""
    if task not in tasks:
        raise InputError(f"task {task!r} is not one of this model's; expected None or {', '.join(tasks) or 'no other'}")
    return tasks[task]
