"""Bodies of requests, field by field: what the OpenAPI page says of them is made from these classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from jinaclip.server.apis.items import IMAGE_FIELDS, Item, kind_of, read_items
from jinaclip.server.errors import Problem, invalid

EmbeddingType = Literal["float", "base64", "binary", "ubinary"]
EmbeddingTypes = EmbeddingType | Annotated[list[EmbeddingType], Field(min_length=1)]
TYPE_FIELDS = ("embedding_type", "encoding_type", "encoding_format")  # one field under three names
B = TypeVar("B", bound=BaseModel)


@dataclass(frozen=True)
class Rules:
    """What a request may ask of this server.

    Attributes:
        model_names: that it may call the model; the first is what answers say.
        dims: lengths that a vector may be cut to.
        tasks: of the bundle.
        most_items: of a request, texts and images together.
        ignore_unknown_tasks: answer as without a task, and say so, instead of refusing.
        take_tokens: token ids may stand for a text.
    """

    model_names: tuple[str, ...]
    dims: tuple[int, ...]
    tasks: tuple[str, ...]
    most_items: int = 2048
    ignore_unknown_tasks: bool = False
    take_tokens: bool = False


def _is_not_true(value: bool | None) -> bool | None:
    if value:
        raise ValueError("not supported")
    return value


OffOnly = Annotated[bool | None, AfterValidator(_is_not_true)]  # clients of other models' APIs send it always


class _Body(BaseModel):
    """What all have. The words of a description also tell what was expected where a value is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str | None, Field(description="a string: a name of the model, as /v1/models lists them")] = None
    dimensions: Annotated[Any, Field(description="a length that vectors may be cut to, a number or a string")] = None
    task: Annotated[str | None, Field(description="a string: its instruction is put before every text")] = None
    truncate: Annotated[bool | None, Field(description="true or false: cut texts that are too long")] = False
    user: Annotated[str | None, Field(description="a string; it is ignored")] = None


class EmbeddingBody(_Body):
    """Of POST /v1/embeddings, in the hosted API's and OpenAI's forms."""

    input: Annotated[Any, Field(description="a text, or a list of texts and images")]
    normalized: Annotated[bool | None, Field(description="true or false: divide vectors by their norm")] = True
    embedding_type: Annotated[
        EmbeddingTypes | None,
        Field(description="one or a list of float, base64, binary, ubinary"),
    ] = None
    encoding_type: Annotated[EmbeddingTypes | None, Field(description="the same as embedding_type")] = None
    encoding_format: Annotated[EmbeddingTypes | None, Field(description="the same as embedding_type")] = None
    late_chunking: Annotated[OffOnly, Field(description="false, for this model gives one vector a text")] = None
    return_multivector: Annotated[OffOnly, Field(description="false, for this model gives one vector a text")] = None
    partial: Annotated[bool | None, Field(description="true or false: answer the items that can be used")] = False


class RankBody(_Body):
    """Of POST /v1/rank."""

    texts: Annotated[Any, Field(description="a text, or a list of texts")]
    images: Annotated[Any, Field(description="an image, or a list of images")]
    over: Annotated[
        Literal["texts", "images"], Field(description="texts or images: what probabilities add up over")
    ] = "texts"
    top_n: Annotated[int | None, Field(ge=1, description="a whole number from 1: results of each query")] = None


@dataclass(frozen=True)
class Asked:
    """What every request for vectors says.

    Attributes:
        dimensions: of the vectors.
        task: None or a task of the bundle.
        truncate: cut texts past the limit instead of refusing them.
        warning: what was ignored; None where nothing was.
    """

    dimensions: int
    task: str | None
    truncate: bool
    warning: str | None


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request that can be answered.

    Attributes:
        field: that the items stand in, for messages.
        items: in the client's order; a problem where `partial` lets the others go on.
        normalized: divide vectors by their norm.
        types: of EmbeddingType, in the client's order.
        single_type: the client named one type and not a list of several.
        partial: answer the items that can be used.
    """

    asked: Asked
    field: str
    items: Sequence[Item | Problem]
    normalized: bool = True
    types: tuple[str, ...] = ("float",)
    single_type: bool = True
    partial: bool = False


@dataclass(frozen=True)
class RankRequest:
    """Texts × images.

    Attributes:
        over: "texts": of every image which text fits it best; "images": of every text which image does.
        top_n: results of each query; None for all.
    """

    asked: Asked
    texts: Sequence[Item | Problem]
    images: Sequence[Item | Problem]
    over: str = "texts"
    top_n: int | None = None


def embedding_request(body: Any, rules: Rules, field: str = "input") -> EmbeddingRequest:
    """Read a decoded JSON body.

    Args:
        field: what the client calls the items.

    Raises:
        Problem: 422, or 404 for another model; names the field, and of an item its index.
    """
    read = _read(EmbeddingBody, body)
    asked = _asked(read, rules)
    types, single = _types(read)
    bits = [kind for kind in types if kind in ("binary", "ubinary")]
    if bits and asked.dimensions % 8:
        raise invalid("dimensions", f"{bits[0]} packs eight numbers into one; expected dimensions divisible by 8")
    partial = bool(read.partial)
    items = read_items(read.input, field, most=rules.most_items, partial=partial, tokens=rules.take_tokens)
    normalized = read.normalized is not False
    return EmbeddingRequest(asked, field, items, normalized, types, single, partial)


def rank_request(body: Any, rules: Rules) -> RankRequest:
    """Read a decoded JSON body.

    Raises:
        Problem: as `embedding_request`.
    """
    read = _read(RankBody, body)
    asked = _asked(read, rules)
    texts = read_items(read.texts, "texts", most=rules.most_items, names=("text",), tokens=rules.take_tokens)
    images = read_items(read.images, "images", most=rules.most_items, names=IMAGE_FIELDS)
    if len(texts) + len(images) > rules.most_items:
        raise invalid("images", f"texts and images are {len(texts) + len(images)} items, at most {rules.most_items} "
                                "are taken at once; send fewer")  # fmt: skip
    return RankRequest(asked, texts, images, read.over, read.top_n)


def _read(kind: type[B], body: Any) -> B:
    if not isinstance(body, dict):
        raise invalid("body", f"the body is {kind_of(body)}, expected a JSON object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        like = get_close_matches(name, kind.model_fields, 1)
        meant = f" (did you mean {like[0]}?)" if like else ""
        known = ", ".join(kind.model_fields)
        raise invalid(name, f"{name!r:.80} is no field of this request{meant}; expected some of {known}",
                      code="unknown_field")  # fmt: skip
    expected = kind.model_fields[name].description
    if problem["type"] == "missing":
        raise invalid(name, f"{name} is missing; expected {expected}", code="missing_field")
    raise invalid(name, f"{name} is {body[name]!r:.80}, expected {expected}")


def _asked(body: _Body, rules: Rules) -> Asked:
    if body.model is not None and body.model not in rules.model_names:
        names = ", ".join(rules.model_names)
        raise Problem(404, "model_not_found", f"model {body.model!r:.80} is not served here; expected {names}",
                      param="model")  # fmt: skip
    task, warning = body.task or None, None  # some clients send "" for none
    if task is not None and task not in rules.tasks:
        known = ", ".join(rules.tasks) or "none"
        if not rules.ignore_unknown_tasks:
            raise invalid("task", f"task is {task!r:.80}, this model has {known}; leave it out, or start the server "
                                  "with --unknown-task ignore", code="unknown_task")  # fmt: skip
        task, warning = None, f"this model has not the task that was asked for, and it was ignored; it has {known}"
    return Asked(_dimensions(body.dimensions, rules.dims), task, bool(body.truncate), warning)


def _dimensions(value: Any, dims: Sequence[int]) -> int:
    if value is None:
        return max(dims)
    for dim in dims:
        if value == str(dim) or (type(value) is int and value == dim):
            return dim
    raise invalid("dimensions", f"dimensions is {value!r:.60}, expected one of {', '.join(map(str, dims))}")


def _types(body: EmbeddingBody) -> tuple[tuple[str, ...], bool]:
    given = {name: value for name in TYPE_FIELDS if (value := getattr(body, name)) is not None}
    if not given:
        return ("float",), True
    name, value = next(iter(given.items()))
    for other, second in given.items():
        if second != value:
            raise invalid(other, f"{name} and {other} are one field, and differ: {value!r:.60} and {second!r:.60}")
    kinds = tuple(dict.fromkeys(value if isinstance(value, list) else [value]))
    return kinds, len(kinds) == 1
