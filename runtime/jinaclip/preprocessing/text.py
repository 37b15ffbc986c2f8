"""Text preprocessing: texts to token ids with the published tokenizer.json, as `<s> … </s>`. Special tokens that are
written out in a text are recognised.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.errors import BundleError, InputError

logger = logging.getLogger("jinaclip")

ADVICE = "expected the tokenizer of the same checkpoint"
SPECIAL_TOKENS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>"}


class TextTokenizer:
    """A tokenizer.json, checked for compatibility with the text tower.

    Args:
        path: the tokenizer.json.
        vocab_size: number of rows in the tower's embedding table.
        special_ids: ids that the tower expects for bos, pad and eos.

    Raises:
        BundleError: the file is not a tokenizer, or its ids do not match the tower.
    """

    def __init__(self, path: Path, *, vocab_size: int, special_ids: Mapping[str, int]) -> None:
        # Must be set before the import. Tokenizing in one thread is faster than the model, and the library's thread
        # pool prints a warning after a fork.
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
            problem = f"{path} has ids up to {largest}, but the text tower's embedding table has {vocab_size} rows"
            raise BundleError(f"{problem}; {ADVICE}")
        for name, token in SPECIAL_TOKENS.items():
            found = self._tokenizer.token_to_id(token)
            if found != special_ids[name]:
                problem = f"{path} has {'no' if found is None else f'id {found} for'} {token}"
                raise BundleError(f"{problem}, the text tower expects {special_ids[name]}; {ADVICE}")
        self.bos, self.pad, self.eos = (special_ids[name] for name in ("bos", "pad", "eos"))
        empty = self.encode([""])[0]
        if empty != [self.bos, self.eos]:
            raise BundleError(f"{path} turns an empty text into {empty}, expected {[self.bos, self.eos]}")

    def encode(self, texts: Sequence[str], *, instruction: str = "") -> list[list[int]]:
        """Token ids of each text, special tokens included, without truncation.

        Args:
            texts: the texts.
            instruction: put before every text.

        Raises:
            InputError: an item is not a str or contains a lone surrogate; `index` is its position.
        """
        result = []
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {index} is a {type(text).__name__}, expected str", index=index)
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                found = f"a lone surrogate U+{ord(text[error.start]):04X} at position {error.start}"
                problem = f"text {index} has {found}, which is not a valid character"
                raise InputError(f"{problem}; decode the text with errors='replace' first", index=index) from None
            result.append(self._tokenizer.encode(instruction + text).ids)
        return result

    def truncated(self, ids: Sequence[list[int]], max_length: int) -> list[list[int]]:
        """Truncate each row to `max_length` ids, the last of which is `</s>`. Logs one warning per call with the
        number of truncated rows.
        """
        over = [len(row) for row in ids if len(row) > max_length]
        if over:
            what = "%d of %d texts were truncated to max_length=%d tokens (the longest has %d)"
            logger.warning(what, len(over), len(ids), max_length, max(over))
        return [[*row[: max_length - 1], self.eos] if len(row) > max_length else row for row in ids]

    def padded(self, ids: Sequence[list[int]]) -> np.ndarray:
        """Pad rows on the right to the longest: int64 [B, T]."""
        batch = np.full((len(ids), max(map(len, ids))), self.pad, np.int64)
        for row, tokens in zip(batch, ids, strict=True):
            row[: len(tokens)] = tokens
        return batch


def instruction_of(task: str | None, tasks: Mapping[str, str], default: str | None) -> str:
    """The instruction to put before every text; empty if there is none.

    Args:
        task: name of the task. None uses the default.
        tasks: instruction of each task.
        default: name of the default task, or None.

    Raises:
        InputError: the model does not support the task; the message lists its tasks.
    """
    task = default if task is None else task
    if task is None:
        return ""
    if task not in tasks:
        others = f" or {', '.join(tasks)}" if tasks else ""
        raise InputError(f"task {task!r} is not supported by this model; expected None{others}")
    return tasks[task]
