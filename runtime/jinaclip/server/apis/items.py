"""Items of a request: texts, pictures, addresses of pictures, token ids. What is in them is read later, in threads."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes

from jinaclip.errors import InputError
from jinaclip.preprocessing.image_sources import decode_base64, split_data_uri
from jinaclip.server.errors import Problem, invalid

IMAGE_FIELDS = ("image", "url", "bytes")  # a picture under any of three names, as the hosted API's clients send it
ITEM_FIELDS = ("text", *IMAGE_FIELDS)
TEXT_CHARACTERS = 1 << 20  # of one text: 128 for each of 8192 tokens


@dataclass(frozen=True)
class Text:
    """One text."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """One text as ids of the bundle's own tokenizer, `<s>` and `</s>` included."""

    ids: list[int]


@dataclass(frozen=True)
class Encoded:
    """One picture, as base64 or a data: URI."""

    value: str


@dataclass(frozen=True)
class Address:
    """One picture, at an http: or https: address."""

    url: str


Item: TypeAlias = Text | Tokens | Encoded | Address


def read_items(value: Any, field: str, *, most: int, partial: bool = False, names: Sequence[str] = ITEM_FIELDS,
               tokens: bool = False) -> list[Item | Problem]:  # fmt: skip
    """The items of a field: one, or a list of them.

    Args:
        field: its name, for messages.
        most: items.
        partial: leave an item that cannot be used as its problem in place.
        names: of ITEM_FIELDS: what an object may hold. A plain string is a text where "text" is among them, else a
            picture.
        tokens: lists of token ids may stand among the items.

    Raises:
        Problem: 422; names the item. With `partial`: none can be used.
    """
    rows = value if isinstance(value, list) else [value]
    if rows and all(_is_number(row) for row in rows):
        rows = [rows]
    if not rows:
        raise invalid(field, f"{field} is an empty list; expected at least one item")
    if len(rows) > most:
        raise invalid(field, f"{field} has {len(rows)} items, at most {most} are taken at once; send fewer")
    found: list[Item | Problem] = []
    for index, row in enumerate(rows):
        try:
            found.append(_item(row, names, tokens))
        except Problem as problem:
            found.append(problem.at(field, index))
    problems = [item for item in found if isinstance(item, Problem)]
    if problems and (not partial or len(problems) == len(found)):
        raise problems[0]
    return found


def picture_of(value: str, most: int) -> bytes:
    """The content of a picture from base64 or a data: URI.

    Args:
        most: bytes.

    Raises:
        Problem: 422.
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
    if len(encoded) * 3 // 4 > 2 * most + 2:  # white space and percent-encoding take room of their own
        _within(bytes(0), most, size=len(encoded) * 3 // 4)
    try:
        return _within(decode(encoded), most)
    except ValueError as error:
        raise invalid("input", f"is no picture in base64 ({error}); paths are not read") from None


def _strict_base64(text: str) -> bytes:
    """Of a plain string: one without its padding may be a path."""
    return base64.b64decode(text, validate=True)


def _within(content: bytes, most: int, *, size: int | None = None) -> bytes:
    size = len(content) if size is None else size
    if size > most:
        raise invalid("input", f"has a picture of {size} bytes, at most {most} are taken", code="image_too_large")
    return content


def _item(row: Any, names: Sequence[str], tokens: bool) -> Item:
    if isinstance(row, str):
        return _text(row) if "text" in names else _picture("image", row)
    if isinstance(row, list):
        return _tokens(row, tokens)
    known = "an object with one of " + ", ".join(names)
    if not isinstance(row, dict):
        raise invalid("input", f"is {kind_of(row)}, expected a string, or {known}")
    if unknown := set(row) - set(names):
        raise invalid("input", f"has {sorted(unknown)[0]!r:.80}, expected {known}")
    given = [name for name in names if row.get(name) is not None]
    if len(given) != 1:
        raise invalid("input", f"has {' and '.join(given) or 'nothing'}, expected {known}")
    (name,) = given
    value = row[name]
    if not isinstance(value, str):
        raise invalid("input", f"has {kind_of(value)} as {name}, expected a string")
    return _text(value) if name == "text" else _picture(name, value)


def _text(text: str) -> Text:
    if len(text) > TEXT_CHARACTERS:
        raise invalid("input", f"is a text of {len(text)} characters, at most {TEXT_CHARACTERS} are read; send less",
                      code="text_too_long")  # fmt: skip
    return Text(text)


def _picture(name: str, value: str) -> Encoded | Address:
    start = value[:8].lower()
    if start.startswith(("http://", "https://")):
        return Address(value)
    if name == "url" and not start.startswith("data:"):
        raise invalid("input", "has no http: or https: address as url, and no data: URI; some clients send "
                               "the path of a file that they do not find")  # fmt: skip
    return Encoded(value)


def _tokens(row: list[Any], taken: bool) -> Tokens:
    if not taken:
        raise invalid(
            "input",
            "holds token ids; another tokenizer's would give wrong vectors, and nothing tells whose they are: send "
            "texts (LangChain: check_embedding_ctx_length=False), or start the server with --accept-token-ids",
            code="token_ids",
        )
    if not all(_is_number(value) for value in row):
        raise invalid("input", "is a list, expected token ids: whole numbers")
    return Tokens(row)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
