"""Request bodies and their validation. The OpenAPI description of the fields is generated from these classes."""

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
TYPE_FIELDS = ("embedding_type", "encoding_type", "encoding_format")  # three names of the same field
B = TypeVar("B", bound=BaseModel)


@dataclass(frozen=True)
class Rules:
    """The values that requests to this server may contain.

    Attributes:
        model_names: the accepted model names; responses contain the first.
        dims: the supported embedding dimensions.
        tasks: the tasks of the bundle.
        most_items: the most items in a request, texts and images together.
        ignore_unknown_tasks: True to ignore an unknown task with a warning, False to reject the request.
        take_tokens: True to accept token ids in place of a text.
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


OffOnly = Annotated[bool | None, AfterValidator(_is_not_true)]  # some clients of other models always send it


class _Body(BaseModel):
    """The fields of all request bodies.

    A description is also used in error messages, after "expected". It begins with the accepted values.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str | None, Field(description="a string: one of the model names listed by /v1/models")] = None
    dimensions: Annotated[Any, Field(description="a supported embedding dimension, as a number or a string")] = None
    task: Annotated[str | None, Field(description="a string: its instruction is added before each text")] = None
    truncate: Annotated[bool | None, Field(description="true or false: truncate texts that are too long")] = False
    user: Annotated[str | None, Field(description="a string, which is ignored")] = None


class EmbeddingBody(_Body):
    """The body of POST /v1/embeddings, in the formats of the hosted API and of OpenAI."""

    input: Annotated[Any, Field(description="a text, an image, or a list of texts and images")]
    normalized: Annotated[bool | None, Field(description="true or false: normalize embeddings to length 1")] = True
    embedding_type: Annotated[
        EmbeddingTypes | None,
        Field(description="float, base64, binary or ubinary, or a list of these"),
    ] = None
    encoding_type: Annotated[EmbeddingTypes | None, Field(description="the same as embedding_type")] = None
    encoding_format: Annotated[EmbeddingTypes | None, Field(description="the same as embedding_type")] = None
    late_chunking: Annotated[OffOnly, Field(description="false: this model returns one vector per text")] = None
    return_multivector: Annotated[OffOnly, Field(description="false: this model returns one vector per text")] = None
    partial: Annotated[
        bool | None, Field(description="true or false: return an error for each invalid item, and embed the others")
    ] = False


class RankBody(_Body):
    """The body of POST /v1/rank."""

    texts: Annotated[Any, Field(description="a text, or a list of texts")]
    images: Annotated[Any, Field(description="an image, or a list of images")]
    over: Annotated[
        Literal["texts", "images"],
        Field(description="texts or images: the candidates, whose probabilities sum to 1 for each query"),
    ] = "texts"
    top_n: Annotated[int | None, Field(ge=1, description="a whole number of at least 1: results per query")] = None


@dataclass(frozen=True)
class Asked:
    """The options that embedding and rank requests share.

    Attributes:
        dimensions: the number of embedding dimensions.
        task: a task of the bundle, or None.
        truncate: True to truncate texts that are too long, False to reject them.
        warning: a message about an ignored option, or None.
    """

    dimensions: int
    task: str | None
    truncate: bool
    warning: str | None


@dataclass(frozen=True)
class EmbeddingRequest:
    """A validated embedding request.

    Attributes:
        asked: the options that all requests share.
        field: the name of the field with the items, for messages.
        items: the items in the client's order; with `partial`, a Problem in place of each invalid item.
        normalized: True to normalize embeddings to length 1.
        types: the requested embedding types, in the client's order.
        single_type: True if one type was requested, False for several.
        partial: True to return an error for each invalid item and embed the others.
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
    """A validated rank request.

    Attributes:
        asked: the options that all requests share.
        texts, images: the items, in the client's order.
        over: "texts" to rank the texts for each image, "images" to rank the images for each text.
        top_n: the most results per query; None for all.
    """

    asked: Asked
    texts: Sequence[Item | Problem]
    images: Sequence[Item | Problem]
    over: str = "texts"
    top_n: int | None = None


def embedding_request(body: Any, rules: Rules, field: str = "input") -> EmbeddingRequest:
    """Validate a decoded JSON body of POST /v1/embeddings.

    Args:
        body: the decoded body.
        rules: the accepted values.
        field: the client's name of the field `input`, for messages.

    Raises:
        Problem: 404 for an unknown model, else 422; with the field and, for an item, its index.
    """
    read = _read(EmbeddingBody, body)
    asked = _asked(read, rules)
    types, single = _types(read)
    bits = [kind for kind in types if kind in ("binary", "ubinary")]
    if bits and asked.dimensions % 8:
        raise invalid("dimensions", f"{bits[0]} packs eight dimensions into a byte; expected dimensions divisible by 8")
    partial = bool(read.partial)
    items = read_items(read.input, field, most=rules.most_items, partial=partial, tokens=rules.take_tokens)
    normalized = read.normalized is not False
    return EmbeddingRequest(asked, field, items, normalized, types, single, partial)


def rank_request(body: Any, rules: Rules) -> RankRequest:
    """Validate a decoded JSON body of POST /v1/rank.

    Args:
        body: the decoded body.
        rules: the accepted values.

    Raises:
        Problem: 404 for an unknown model, else 422; with the field and, for an item, its index.
    """
    read = _read(RankBody, body)
    asked = _asked(read, rules)
    texts = read_items(read.texts, "texts", most=rules.most_items, names=("text",), tokens=rules.take_tokens)
    images = read_items(read.images, "images", most=rules.most_items, names=IMAGE_FIELDS)
    if len(texts) + len(images) > rules.most_items:
        raise invalid("images", f"texts and images have {len(texts) + len(images)} items together, the limit is "
                                f"{rules.most_items} per request; send fewer")  # fmt: skip
    return RankRequest(asked, texts, images, read.over, read.top_n)


def _read(kind: type[B], body: Any) -> B:
    if not isinstance(body, dict):
        raise invalid("body", f"The request body is {kind_of(body)}, expected a JSON object.")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        like = get_close_matches(name, kind.model_fields, 1)
        meant = f" (did you mean {like[0]}?)" if like else ""
        known = ", ".join(kind.model_fields)
        raise invalid(name, f"{name!r:.80} is not a field of this request{meant}; expected some of {known}",
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
    task, warning = body.task or None, None  # some clients send "" for no task
    if task is not None and task not in rules.tasks:
        known = ", ".join(rules.tasks) or "none"
        if not rules.ignore_unknown_tasks:
            raise invalid("task", f"task {task!r:.80} is not supported; supported tasks: {known}. Remove task, or "
                                  "start the server with --unknown-task ignore.", code="unknown_task")  # fmt: skip
        task, warning = None, f"The requested task is not supported and was ignored. Supported tasks: {known}"
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
            raise invalid(other, f"{name} and {other} are names of the same field, but their values differ: "
                                 f"{value!r:.60} and {second!r:.60}")  # fmt: skip
    kinds = tuple(dict.fromkeys(value if isinstance(value, list) else [value]))
    return kinds, len(kinds) == 1
