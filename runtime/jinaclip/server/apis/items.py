"""The items of a request: texts, images, image URLs and token ids. Their content is decoded later, in threads."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes

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
class Tokens:
    """One text as token ids of the bundle's tokenizer, including `<s>` and `</s>`."""

    ids: list[int]


@dataclass(frozen=True)
class Encoded:
    """One image, as base64 or a data: URI."""

    value: str


@dataclass(frozen=True)
class Address:
    """One image, as an http: or https: URL."""

    url: str


Item: TypeAlias = Text | Tokens | Encoded | Address


def read_items(
    value: Any,
    field: str,
    limit: int,
    *,
    names: Sequence[str] = ITEM_FIELDS,
    token_ids: bool = False,
    partial: bool = False,
) -> list[Item | Problem]:
    """Validate the value of a request field: one item, or a list of items.

    Args:
        value: the decoded JSON value.
        field: the name of the field, for messages.
        limit: the most items.
        names: the fields that an item object may contain, some of ITEM_FIELDS. A plain string is a text if "text" is
            among them, otherwise an image.
        token_ids: True to accept lists of token ids.
        partial: True to return a Problem in place of each invalid item.

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
    found: list[Item | Problem] = []
    for index, row in enumerate(rows):
        try:
            found.append(_item(row, names, token_ids))
        except Problem as problem:
            found.append(problem.at(field, index))
    problems = [item for item in found if isinstance(item, Problem)]
    if problems and (not partial or len(problems) == len(found)):
        raise problems[0]
    return found


def picture_of(value: str, most: int) -> bytes:
    """Decode an image file from base64 or a data: URI.

    Args:
        value: the base64 text or data: URI.
        most: the largest size of the file, in bytes.

    Raises:
        Problem: 422, the value is invalid or the file is too large.
    """
    encoded = value
    decode: Callable[[str], bytes] = _strict_base64
    if value[:5].lower() == "data:":
        try:
            encoded, is_base64 = split_data_uri(value)
        except InputError:
            raise invalid("input", "is a data: URI without a comma") from None
        if not is_base64:
            return _within(unquote_to_bytes(encoded), most)
        decode = decode_base64
    if len(encoded) * 3 // 4 > 2 * most + 2:  # allows for white space and percent-encoding
        _within(bytes(0), most, size=len(encoded) * 3 // 4)
    try:
        return _within(decode(encoded), most)
    except ValueError as error:
        raise invalid("input", f"is not valid base64 ({error}); send the image itself, not a file path") from None


def _strict_base64(text: str) -> bytes:
    """Decode a plain string. Padding is required because a string without it may be a file path."""
    return base64.b64decode(text, validate=True)


def _within(content: bytes, most: int, *, size: int | None = None) -> bytes:
    size = len(content) if size is None else size
    if size > most:
        raise invalid("input", f"is an image file of {size} bytes, the limit is {most} bytes", code="image_too_large")
    return content


def _item(row: Any, names: Sequence[str], tokens: bool) -> Item:
    if isinstance(row, str):
        return _text(row) if "text" in names else _picture("image", row)
    if isinstance(row, list):
        return _tokens(row, tokens)
    known = "an object with one of the fields " + ", ".join(names)
    if not isinstance(row, dict):
        raise invalid("input", f"is {kind_of(row)}, expected a string, or {known}")
    if unknown := set(row) - set(names):
        raise invalid("input", f"has the unsupported field {sorted(unknown)[0]!r:.80}, expected {known}")
    given = [name for name in names if row.get(name) is not None]
    if len(given) != 1:
        raise invalid("input", f"has {' and '.join(given) or 'no value'}, expected {known}")
    (name,) = given
    value = row[name]
    if not isinstance(value, str):
        raise invalid("input", f"has {kind_of(value)} in the field {name}, expected a string")
    return _text(value) if name == "text" else _picture(name, value)


def _text(text: str) -> Text:
    if len(text) > TEXT_CHARACTERS:
        raise invalid("input", f"has {len(text)} characters, the limit is {TEXT_CHARACTERS}; send a shorter text",
                      code="text_too_long")  # fmt: skip
    return Text(text)


def _picture(name: str, value: str) -> Encoded | Address:
    start = value[:8].lower()
    if start.startswith(("http://", "https://")):
        return Address(value)
    if name == "url" and not start.startswith("data:"):
        raise invalid("input", "has a url that is not an http:, https: or data: URL; some clients send a file path "
                               "here if they cannot find the file")  # fmt: skip
    return Encoded(value)


def _tokens(row: list[Any], taken: bool) -> Tokens:
    if not taken:
        raise invalid(
            "input",
            "contains token ids, which give wrong embeddings if they are from another tokenizer; send text (LangChain: "
            "check_embedding_ctx_length=False), or start the server with --accept-token-ids",
            code="token_ids",
        )
    if not all(_is_number(value) for value in row):
        raise invalid("input", "contains a value that is not a whole number; expected a list of token ids")
    return Tokens(row)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def kind_of(value: Any) -> str:
    """The type of a JSON value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
