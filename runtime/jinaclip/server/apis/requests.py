"""Requests: their fields and their validation. The OpenAPI description of the fields is made from these classes."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from operator import not_
from typing import Annotated, Any, Literal, Self, TypeVar

from annotated_types import Predicate
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from jinaclip.server.apis.items import IMAGE_FIELDS, kind_of, read_items
from jinaclip.server.errors import Problem, invalid

EmbeddingType = Literal["float", "base64", "binary", "ubinary"]
EmbeddingTypes = EmbeddingType | Annotated[list[EmbeddingType], Field(min_length=1)] | None
R = TypeVar("R", bound="Request")

# For options that clients of other models always send. Literal[False] would accept 0 too.
FalseOnly = Annotated[bool | None, Predicate(not_), WithJsonSchema({"enum": [False, None]})]


@dataclass(frozen=True)
class Rules:
    """The values that requests to this server may contain.

    Attributes:
        model_names: the accepted model names; responses contain the first.
        dims: the supported embedding dimensions.
        tasks: the tasks of the bundle.
        max_items: the most items in a request, texts and images together.
        ignore_unknown_tasks: True to ignore an unknown task with a warning, False to reject the request.
        accept_token_ids: True to accept token ids in place of a text.
    """

    model_names: tuple[str, ...]
    dims: tuple[int, ...]
    tasks: tuple[str, ...]
    max_items: int = 2048
    ignore_unknown_tasks: bool = False
    accept_token_ids: bool = False


class Request(BaseModel):
    """The fields of all requests. The validation context is the server's Rules.

    A description is also used in error messages, after "expected". It begins with the accepted values.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="a string: one of the model names listed by /v1/models")
    dimensions: Any = Field(None, description="a supported embedding dimension, as a number or a string")
    task: str | None = Field(None, description="a string: its instruction is added before each text")
    truncate: bool | None = Field(False, description="true or false: truncate texts that are too long")
    user: str | None = Field(None, description="a string, which is ignored")

    _headers: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response: a warning about an ignored option."""
        return self._headers

    @model_validator(mode="after")
    def _apply_rules(self, info: ValidationInfo[Rules]) -> Self:
        """Check the model name, and replace `task` and `dimensions` by the values that are used."""
        rules = info.context
        if self.model not in (None, *rules.model_names):
            message = f"model {self.model!r:.80} is not served here; expected {', '.join(rules.model_names)}"
            raise Problem(404, "model_not_found", message, param="model")
        self.task = self.task or None  # some clients send "" for no task
        if self.task not in (None, *rules.tasks):
            known = ", ".join(rules.tasks) or "none"
            if not rules.ignore_unknown_tasks:
                what = f"task {self.task!r:.80} is not supported; supported tasks: {known}"
                advice = "Remove task, or start the server with --unknown-task ignore."
                raise invalid("task", f"{what}. {advice}", code="unknown_task")
            self.task = None
            warning = f"The requested task is not supported and was ignored. Supported tasks: {known}"
            self._headers = {"X-Jinaclip-Warning": warning}
        if self.dimensions is None:
            self.dimensions = max(rules.dims)
        if type(self.dimensions) not in (int, str) or str(self.dimensions) not in map(str, rules.dims):
            expected = ", ".join(map(str, rules.dims))
            raise invalid("dimensions", f"dimensions is {self.dimensions!r:.60}, expected one of {expected}")
        self.dimensions = int(self.dimensions)
        return self


class EmbeddingRequest(Request):
    """A request to /v1/embeddings, in the formats of the hosted API and of OpenAI."""

    input: Any = Field(description="a text, an image, or a list of texts and images")
    normalized: bool | None = Field(True, description="true or false: normalize embeddings to length 1")
    embedding_type: EmbeddingTypes = Field(None, description="float, base64, binary or ubinary, or a list of these")
    encoding_type: EmbeddingTypes = Field(None, description="the same as embedding_type")
    encoding_format: EmbeddingTypes = Field(None, description="the same as embedding_type")
    late_chunking: FalseOnly = Field(None, description="false: this model returns one vector per text")
    return_multivector: FalseOnly = Field(None, description="false: this model returns one vector per text")
    partial: bool | None = Field(
        False, description="true or false: return an error for each invalid item, and embed the others"
    )

    @property
    def types(self) -> tuple[str, ...]:
        """The requested embedding types, in the client's order."""
        value = self.embedding_type or self.encoding_type or self.encoding_format or "float"
        return tuple(dict.fromkeys([value] if isinstance(value, str) else value))

    @model_validator(mode="after")
    def _check_types(self) -> Self:
        names = ("embedding_type", "encoding_type", "encoding_format")
        given = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        for (name, value), (other, second) in pairwise(given):
            if value != second:
                what = f"{name} and {other} are names of the same field, but their values differ"
                raise invalid(other, f"{what}: {value!r:.60} and {second!r:.60}")
        packed = [kind for kind in self.types if kind.endswith("binary")]
        if packed and self.dimensions % 8:
            what = f"{packed[0]} packs eight dimensions into a byte; expected dimensions divisible by 8"
            raise invalid("dimensions", what)
        return self


class RankRequest(Request):
    """A request to /v1/rank."""

    texts: Any = Field(description="a text, or a list of texts")
    images: Any = Field(description="an image, or a list of images")
    over: Literal["texts", "images"] = Field(
        "texts", description="texts or images: the candidates, whose probabilities sum to 1 for each query"
    )
    top_n: int | None = Field(None, ge=1, description="a whole number of at least 1: results per query")


def embedding_request(body: Any, rules: Rules, field: str = "input") -> EmbeddingRequest:
    """Validate a decoded JSON body of POST /v1/embeddings. `input` becomes a list of Item.

    Args:
        body: the decoded body.
        rules: the accepted values.
        field: the client's name of the field `input`, for messages.

    Raises:
        Problem: 404 for an unknown model, else 422; with the field and, for an item, its index.
    """
    request = _parsed(EmbeddingRequest, body, rules)
    request.input = read_items(
        request.input, field, rules.max_items, token_ids=rules.accept_token_ids, partial=bool(request.partial)
    )
    return request


def rank_request(body: Any, rules: Rules) -> RankRequest:
    """Validate a decoded JSON body of POST /v1/rank. `texts` and `images` become lists of Item.

    Args:
        body: the decoded body.
        rules: the accepted values.

    Raises:
        Problem: 404 for an unknown model, else 422; with the field and, for an item, its index.
    """
    request = _parsed(RankRequest, body, rules)
    read = partial(read_items, limit=rules.max_items, partial=False)
    request.texts = read(request.texts, "texts", names=("text",), token_ids=rules.accept_token_ids)
    request.images = read(request.images, "images", names=IMAGE_FIELDS, token_ids=False)
    if (count := len(request.texts) + len(request.images)) > rules.max_items:
        limit = f"the limit is {rules.max_items} per request; send fewer"
        raise invalid("images", f"texts and images have {count} items together, {limit}")
    return request


def _parsed(kind: type[R], body: Any, rules: Rules) -> R:
    if not isinstance(body, dict):
        raise invalid("body", f"The request body is {kind_of(body)}, expected a JSON object.")
    try:
        return kind.model_validate(body, context=rules)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        like = get_close_matches(name, kind.model_fields, 1)
        meant = f" (did you mean {like[0]}?)" if like else ""
        what = f"{name!r:.80} is not a field of this request{meant}; expected some of {', '.join(kind.model_fields)}"
        raise invalid(name, what, code="unknown_field")
    expected = kind.model_fields[name].description
    if problem["type"] == "missing":
        raise invalid(name, f"{name} is missing; expected {expected}", code="missing_field")
    raise invalid(name, f"{name} is {body[name]!r:.80}, expected {expected}")
