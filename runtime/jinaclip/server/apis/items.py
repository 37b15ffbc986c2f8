"""The items of a request: texts, images, image URLs and token ids. Their content is decoded later, in threads."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import partial
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np

from jinaclip.errors import InputError
from jinaclip.preprocessing.image_sources import decode_base64, split_data_uri
from jinaclip.server.errors import Problem, invalid

IMAGE_FIELDS = ("image", "url", "bytes")  # three names of an image field, all used by clients of the hosted API
ITEM_FIELDS = ("text", *IMAGE_FIELDS)
TEXT_CHARACTERS = 1 << 20  # the most characters in a text: 128 for each of 8192 tokens


@dataclass(frozen=True)
class Text:
    """One text."""

    text: str


@dataclass(frozen=True)
class TokenIds:
    """One text as token ids of the bundle's tokenizer, including `<s>` and `</s>`."""

    ids: list[int]


@dataclass(frozen=True)
class ImageFile:
    """One image file, as base64 or a data: URI."""

    encoded: str


@dataclass(frozen=True)
class ImageUrl:
    """One image, as an http: or https: URL."""

    url: str


Content: TypeAlias = Text | TokenIds | ImageFile | ImageUrl


@dataclass(slots=True, eq=False, repr=False)
class Item:
    """One item of a request, from its validation to its embedding.

    Attributes:
        field: the name of the request field with the item.
        index: the position of the item in this field.
        content: what the client sent; None if it is invalid.
        problem: why there is no embedding, or None.
        model_input: the token ids of a text, or the pixels of an image, uint8 [size, size, 3].
        tokens: the number of tokens counted for usage.
        vector: the unnormalized embedding, float32 [D].
    """

    field: str
    index: int
    content: Content | None = None
    problem: Problem | None = None
    model_input: list[int] | np.ndarray = dataclass_field(init=False)
    tokens: int = 0
    vector: np.ndarray = dataclass_field(init=False)

    @property
    def tower(self) -> str:
        """The tower that embeds the item: "text" or "image"."""
        return "text" if isinstance(self.content, Text | TokenIds) else "image"

    def fail(self, problem: Problem) -> None:
        """Set the problem. Its message gets the field and the index of the item."""
        self.problem = problem.at(self.field, self.index)


def valid_items(items: Sequence[Item], *, partial: bool) -> list[Item]:
    """The items without a problem.

    Raises:
        Problem: the first problem, unless `partial` is true and another item is valid.
    """
    valid = [item for item in items if item.problem is None]
    if len(valid) < len(items) and not (partial and valid):
        raise next(item.problem for item in items if item.problem is not None)
    return valid


def read_items(
    value: Any, field: str, limit: int, *, names: Sequence[str] = ITEM_FIELDS, token_ids: bool, partial: bool
) -> list[Item]:
    """Validate the value of a request field: one item, or a list of items.

    Args:
        value: the decoded JSON value.
        field: the name of the field, for messages.
        limit: the most items.
        names: the fields that an item object may contain, some of ITEM_FIELDS. A plain string is a text if "text" is
            among them, otherwise an image.
        token_ids: True to accept lists of token ids.
        partial: True to set the problem of each invalid item instead of raising it.

    Raises:
        Problem: 422, an item is invalid; the message contains its index. With `partial`, all items are invalid.
    """
    rows = value if isinstance(value, list) else [value]
    if rows and all(_is_number(row) for row in rows):
        rows = [rows]
    if not rows:
        raise invalid(field, f"{field} is an empty list; expected at least one item")
    if len(rows) > limit:
        raise invalid(field, f"{field} has {len(rows)} items, the limit is {limit} per request; send fewer")
    items = []
    for index, row in enumerate(rows):
        items.append(item := Item(field, index))
        try:
            item.content = _content(row, names, token_ids)
        except Problem as problem:
            item.fail(problem)
    valid_items(items, partial=partial)
    return items


def decode_image_file(encoded: str, limit: int) -> bytes:
    """Decode an image file from base64 or a data: URI.

    Args:
        encoded: the base64 text or data: URI.
        limit: the largest size of the file, in bytes.

    Raises:
        Problem: 422, the value is invalid or the file is too large.
    """
    # Plain base64 needs its padding, because a string without it may be a file path.
    decode: Callable[[str], bytes] = partial(b64decode, validate=True)
    if encoded[:5].lower() == "data:":
        try:
            encoded, is_base64 = split_data_uri(encoded)
        except InputError:
            raise invalid("input", "is a data: URI without a comma") from None
        decode = decode_base64 if is_base64 else unquote_to_bytes
    if len(encoded) > 3 * limit + 4:  # the bound leaves room for white space and percent-encoding
        raise _too_large(len(encoded) * 3 // 4, limit)
    try:
        content = decode(encoded)
    except ValueError as error:
        raise invalid("input", f"is not valid base64 ({error}); send the image itself, not a file path") from None
    if len(content) > limit:
        raise _too_large(len(content), limit)
    return content


def _too_large(size: int, limit: int) -> Problem:
    return invalid("input", f"is an image file of {size} bytes, the limit is {limit} bytes", code="image_too_large")


def _content(row: Any, names: Sequence[str], token_ids: bool) -> Content:
    if isinstance(row, str):
        return _text(row) if "text" in names else _image("image", row)
    if isinstance(row, list):
        return _token_ids(row, token_ids)
    expected = f"an object with one of the fields {', '.join(names)}"
    if not isinstance(row, dict):
        raise invalid("input", f"is {kind_of(row)}, expected a string, or {expected}")
    if unknown := set(row) - set(names):
        raise invalid("input", f"has the unsupported field {min(unknown)!r:.80}, expected {expected}")
    given = [name for name in names if row.get(name) is not None]
    if len(given) != 1:
        raise invalid("input", f"has {' and '.join(given) or 'no value'}, expected {expected}")
    (name,) = given
    value = row[name]
    if not isinstance(value, str):
        raise invalid("input", f"has {kind_of(value)} in the field {name}, expected a string")
    return _text(value) if name == "text" else _image(name, value)


def _text(text: str) -> Text:
    if len(text) > TEXT_CHARACTERS:
        what = f"has {len(text)} characters, the limit is {TEXT_CHARACTERS}; send a shorter text"
        raise invalid("input", what, code="text_too_long")
    return Text(text)


def _image(name: str, value: str) -> ImageFile | ImageUrl:
    start = value[:8].lower()
    if start.startswith(("http://", "https://")):
        return ImageUrl(value)
    if name == "url" and not start.startswith("data:"):
        advice = "some clients send a file path here if they cannot find the file"
        raise invalid("input", f"has a url that is not an http:, https: or data: URL; {advice}")
    return ImageFile(value)


def _token_ids(row: list[Any], accepted: bool) -> TokenIds:
    if not accepted:
        what = "contains token ids, which give wrong embeddings if they are from another tokenizer"
        advice = "send text (LangChain: check_embedding_ctx_length=False), or start the server with --accept-token-ids"
        raise invalid("input", f"{what}; {advice}", code="token_ids")
    if not all(_is_number(value) for value in row):
        raise invalid("input", "contains a value that is not a whole number; expected a list of token ids")
    return TokenIds(row)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def kind_of(value: Any) -> str:
    """The type of a JSON value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
