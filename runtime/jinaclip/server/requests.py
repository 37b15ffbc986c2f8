"""The body of POST /v1/embeddings, as the hosted API and OpenAI's clients send it, checked field by field."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from jinaclip.server.problems import Problem, invalid

EMBEDDING_TYPES = ("float", "base64", "binary", "ubinary")
TYPE_FIELDS = ("embedding_type", "encoding_type", "encoding_format")  # one field under three names
FIELDS = (
    "model", "input", "dimensions", "task", "normalized", "truncate", "late_chunking", *TYPE_FIELDS, "user", "partial"
)  # fmt: skip
ITEM_FIELDS = ("text", "image", "url", "bytes")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        items: texts and images together.
        image_bytes: of one picture, decoded from base64.
    """

    items: int = 2048
    image_bytes: int = 32 << 20


@dataclass(frozen=True)
class Text:
    """One text of the input."""

    text: str


@dataclass(frozen=True)
class Picture:
    """One picture of the input, as a file's content."""

    content: bytes


Item = Text | Picture | Problem  # the last where an item cannot be used, and `partial` lets the others go on


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request that can be answered.

    Attributes:
        model: as the client called it; None where it did not.
        items: in the client's order.
        dimensions: of the vectors; None for all.
        task: None or a task of the bundle.
        normalized: divide vectors by their norm.
        truncate: cut texts past the limit instead of refusing them.
        types: of EMBEDDING_TYPES, in the client's order.
        single_type: the client named one type and not a list of them.
        partial: answer the items that can be used.
    """

    model: str | None
    items: Sequence[Item]
    dimensions: int | None
    task: str | None
    normalized: bool
    truncate: bool
    types: tuple[str, ...]
    single_type: bool
    partial: bool


def parse_request(body: Any, *, dims: Sequence[int], tasks: Sequence[str], limits: Limits) -> EmbeddingRequest:
    """Read a decoded JSON body.

    Args:
        dims: lengths that a vector may be cut to.
        tasks: of the bundle.

    Raises:
        Problem: 422; names the field, and of an item its index.
    """
    if not isinstance(body, dict):
        raise invalid("body", f"the body is {_kind(body)}, expected a JSON object with model and input")
    for name in body:
        if name not in FIELDS:
            raise invalid(name, f"{name!r:.80} is no field of this request; expected some of {', '.join(FIELDS)}",
                          code="unknown_field")  # fmt: skip
    if body.get("late_chunking") not in (None, False):
        raise invalid("late_chunking", "late_chunking is not supported: this model gives one vector a text; send false")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise invalid("model", f"model is {_kind(model)}, expected a string")
    partial = _boolean(body, "partial", False)
    types, single = _types(body)
    dimensions = _dimensions(body.get("dimensions"), dims)
    bits = [kind for kind in types if kind in ("binary", "ubinary")]
    if bits and (dimensions or max(dims)) % 8:
        raise invalid("dimensions", f"{bits[0]} packs eight numbers into one; expected dimensions divisible by 8")
    return EmbeddingRequest(
        model=model,
        items=_items(body, limits, partial=partial),
        dimensions=dimensions,
        task=_task(body.get("task"), tasks),
        normalized=_boolean(body, "normalized", True),
        truncate=_boolean(body, "truncate", False),
        types=types,
        single_type=single,
        partial=partial,
    )


def _items(body: Mapping[str, Any], limits: Limits, *, partial: bool) -> list[Item]:
    if "input" not in body:
        raise invalid("input", "input is missing; expected a text, or a list of texts and images", code="missing_field")
    value = body["input"]
    rows = value if isinstance(value, list) else [value]
    if not rows:
        raise invalid("input", "input is an empty list; expected at least one text or image")
    if len(rows) > limits.items:
        raise invalid("input", f"input has {len(rows)} items, at most {limits.items} are taken at once; send fewer")
    if all(_is_number(row) for row in rows) or any(isinstance(row, list) for row in rows):
        raise invalid(
            "input",
            "input holds token ids; another tokenizer's would give wrong vectors, and nothing tells whose they are: "
            "send texts (LangChain: check_embedding_ctx_length=False)",
            code="token_ids",
        )
    found: list[Item] = []
    for index, row in enumerate(rows):
        try:
            found.append(_item(row, index, limits))
        except Problem as problem:
            if not partial:
                raise
            found.append(problem)
    first = found[0]
    if isinstance(first, Problem) and all(isinstance(item, Problem) for item in found):
        raise first
    return found


def _item(row: Any, index: int, limits: Limits) -> Text | Picture:
    if isinstance(row, str):
        return Text(row)
    if not isinstance(row, dict):
        raise _bad(index, f"is {_kind(row)}, expected a string, or an object with one of {', '.join(ITEM_FIELDS)}")
    given = [name for name in ITEM_FIELDS if row.get(name) is not None]
    if unknown := set(row) - set(ITEM_FIELDS):
        raise _bad(index, f"has {sorted(map(str, unknown))[0]!r:.80}, expected one of {', '.join(ITEM_FIELDS)}")
    if len(given) != 1:
        raise _bad(index, f"has {' and '.join(given) or 'nothing'}, expected one of {', '.join(ITEM_FIELDS)}")
    (name,) = given
    value = row[name]
    if not isinstance(value, str):
        raise _bad(index, f"has {_kind(value)} as {name}, expected a string")
    if name == "text":
        return Text(value)
    return Picture(_picture(value, name, index, limits))


def _picture(value: str, name: str, index: int, limits: Limits) -> bytes:
    """The content of a picture from an address, a data: URI or base64."""
    start = value[:8].lower()
    if start.startswith(("http://", "https:/")):
        raise _bad(index, "is an address, and this server fetches none; send the picture as base64 or as a data: URI")
    if name == "url" and not start.startswith("data:"):
        raise _bad(index, "has no address as url; expected a data: URI, or the picture's base64 as image or bytes")
    encoded = value
    if start.startswith("data:"):
        header, comma, encoded = value.partition(",")
        if not comma:
            raise _bad(index, "is a data: URI without a comma")
        if not header.lower().endswith(";base64"):
            content = unquote_to_bytes(encoded)
            return _within(content, len(content), index, limits)
    _within(b"", len(encoded) * 3 // 4, index, limits)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(index, f"is no picture in base64 ({error}); paths and addresses are not read") from None


def _within(content: bytes, size: int, index: int, limits: Limits) -> bytes:
    if size > limits.image_bytes:
        raise _bad(index, f"has a picture of {size} bytes, at most {limits.image_bytes} are taken")
    return content


def _types(body: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    given = {name: body[name] for name in TYPE_FIELDS if body.get(name) is not None}
    if not given:
        return ("float",), True
    name, value = next(iter(given.items()))
    for other, second in given.items():
        if second != value:
            raise invalid(other, f"{name} and {other} are one field, and differ: {value!r:.60} and {second!r:.60}")
    kinds = value if isinstance(value, list) else [value]
    if not kinds or any(kind not in EMBEDDING_TYPES for kind in kinds):
        raise invalid(name, f"{name} is {value!r:.80}, expected one or a list of {', '.join(EMBEDDING_TYPES)}")
    return tuple(dict.fromkeys(kinds)), len(set(kinds)) == 1


def _dimensions(value: Any, dims: Sequence[int]) -> int | None:
    if value is None:
        return None
    number = (
        int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 7 else value
    )
    if isinstance(number, bool) or not isinstance(number, int) or number not in dims:
        raise invalid("dimensions", f"dimensions is {value!r:.60}, expected one of {', '.join(map(str, dims))}")
    return number


def _task(value: Any, tasks: Sequence[str]) -> str | None:
    if value is None:
        return None
    if value not in tasks:
        known = ", ".join(tasks) or "none"
        raise invalid("task", f"task is {value!r:.80}, this model has {known}; or leave it out", code="unknown_task")
    return str(value)


def _boolean(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(name, f"{name} is {value!r:.60}, expected true or false")
    return value


def _bad(index: int, what: str) -> Problem:
    return invalid("input", f"input[{index}] {what}", code="invalid_input", index=index)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
