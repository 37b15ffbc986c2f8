"""The OpenAPI 3.1 description of the server, and an HTML page of it that works without JavaScript."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel

from jinaclip.server.apis.items import IMAGE_FIELDS, ITEM_FIELDS, TEXT_CHARACTERS
from jinaclip.server.apis.requests import EmbeddingRequest, RankRequest, Rules
from jinaclip.server.errors import TYPES

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
ERRORS = {
    400: "The request body is not valid JSON.", 401: "The API key is missing or wrong.",
    403: "The server may not connect to the host of an image URL.", 404: "The model is unknown.",
    408: "The request body was not received in time.", 413: "The request body is too large.",
    415: "The content type is not application/json.",
    422: "A value is invalid; param and index identify it.",
    429: "The queue is full; retry after the time in Retry-After.", 500: "The server failed.",
    503: "The server is shutting down, or a tower does not work.",
}  # fmt: skip
EXAMPLES: dict[str, Any] = {
    "/v1/embeddings": {"input": ["a cup of coffee", {"image": "data:image/png;base64,…"}], "task": "retrieval.query"},
    "/v1/rank": {"texts": ["a cat", "a dog"], "images": [{"image": "data:image/png;base64,…"}], "over": "texts"},
}


def description(rules: Rules, max_tokens: int, *, keyed: bool) -> Schema:
    """The OpenAPI document of a server.

    Args:
        rules: the values that requests may contain.
        max_tokens: the most tokens in a text.
        keyed: True if clients must send an API key.
    """
    embedding = _described(EmbeddingRequest, rules)
    embedding["properties"]["input"] |= _one_or_more(_items(ITEM_FIELDS, rules.accept_token_ids), rules.max_items)
    rank = _described(RankRequest, rules)
    rank["properties"]["texts"] |= _one_or_more(_items(("text",), rules.accept_token_ids), rules.max_items)
    rank["properties"]["images"] |= _one_or_more(_items(IMAGE_FIELDS, False), rules.max_items)
    about = (
        f"Embeddings of texts (up to {max_tokens} tokens) and images in one vector space. "
        f"Dimensions: {', '.join(map(str, rules.dims))}. "
        f"Models: {', '.join(rules.model_names)}. Tasks: {', '.join(rules.tasks) or 'none'}."
    )
    vectors = "Embed texts and images, in the order of the request"
    return {
        "openapi": "3.1.0",
        "info": {"title": "jinaclip", "version": version("jinaclip"), "description": about},
        "paths": {
            "/v1/embeddings": {"post": _operation(vectors, "EmbeddingAnswer", ERRORS, body="EmbeddingRequest")},
            "/v1/rank": {
                "post": _operation("Rank texts or images, by a softmax of the model's logits", "RankAnswer", ERRORS,
                                   body="RankRequest")
            },
            "/v1/models": {"get": _operation("The model, its licence and its capabilities", "Models", (401,))},
            "/health": {"get": _operation("The backend and the last self-test of each tower", "Health", (),
                                          also={503: "Health"}, open_to_all=True)},
            "/ready": {"get": _operation("Whether the server accepts requests", "Ready", (503,), open_to_all=True)},
            "/metrics": {"get": _operation("Metrics in the Prometheus text format", None, (401,), media="text/plain")},
            "/openapi.json": {"get": _operation("This OpenAPI description", "Anything", (401,))},
            "/docs": {"get": _operation("This description as an HTML page", None, (401,), media="text/html")},
        },
        "components": {
            "schemas": {"EmbeddingRequest": embedding, "RankRequest": rank, **_answers()},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"bearer": []}] if keyed else [],
    }  # fmt: skip


def page(document: Schema) -> str:
    """The OpenAPI document as an HTML page."""
    parts = [f"<h1>jinaclip {_text(document['info']['version'])}</h1><p>{_text(document['info']['description'])}</p>"]
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2>{method.upper()} {_text(path)}</h2><p>{_text(operation['summary'])}</p>")
            if "requestBody" in operation:
                name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                fields = schemas[name]["properties"]
                parts.append(_table([(f"<code>{_text(n)}</code>", _text(f["description"])) for n, f in fields.items()]))
                parts.append(f"<pre>{_text(json.dumps(EXAMPLES[path], ensure_ascii=False, indent=2))}</pre>")
    parts.append('<h2>Errors</h2><p><code>{"detail": text, "error": {message, type, param, code}}</code></p>')
    parts.append(_table([(str(status), _text(words)) for status, words in ERRORS.items()]))
    style = "body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto}td{padding:0 1em 0 0;vertical-align:top}"
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>jinaclip</title><style>{style}</style>"
    return f"{head}{''.join(parts)}<p><a href=/openapi.json>openapi.json</a></html>"


def _described(body: type[BaseModel], rules: Rules) -> Schema:
    """The schema of a request body, with the dimensions, model names and tasks of this server."""
    schema = body.model_json_schema()
    fields = schema["properties"]
    for field in fields.values():
        field.pop("title", None)
    fields["dimensions"] = {"enum": [*rules.dims, *map(str, rules.dims), None], **_words(schema, "dimensions")}
    fields["model"] = {"enum": [*rules.model_names, None], **_words(schema, "model")}
    tasks: Schema = {"type": ["string", "null"]} if rules.ignore_unknown_tasks else {"enum": [*rules.tasks, "", None]}
    fields["task"] = {**tasks, **_words(schema, "task")}
    return schema


def _words(schema: Schema, field: str) -> Schema:
    return {"description": schema["properties"][field]["description"]}


def _items(names: Sequence[str], take_tokens: bool) -> list[Schema]:
    """The schemas of an item: a string, or an object with one of the names; the other names are absent or null."""
    text = {"type": "string", "maxLength": TEXT_CHARACTERS}
    kinds = [
        {
            "type": "object",
            "properties": {other: (text if name == "text" else STRING) if other == name else {"type": "null"}
                           for other in names},
            "required": [name],
            "additionalProperties": False,
        }
        for name in names
    ]  # fmt: skip
    tokens = [{"type": "array", "items": {"type": "integer"}}] if take_tokens else []
    return [text if "text" in names else STRING, *kinds, *tokens]


def _one_or_more(items: list[Schema], most: int) -> Schema:
    return {"anyOf": [*items, {"type": "array", "items": {"anyOf": items}, "minItems": 1, "maxItems": most}]}


def _operation(
    summary: str, answer: str | None, errors: Sequence[int] | dict[int, str], *, body: str | None = None,
    media: str = "application/json", also: dict[int, str] | None = None, open_to_all: bool = False,
) -> Schema:  # fmt: skip
    schema = _reference(answer) if answer is not None else STRING
    responses: Schema = {"200": {"description": "The response.", "content": {media: {"schema": schema}}}}
    for status, name in {**dict.fromkeys(errors, "Error"), **(also or {})}.items():
        responses[str(status)] = {
            "description": ERRORS[status], "content": {"application/json": {"schema": _reference(name)}},
        }  # fmt: skip
    found: Schema = {"summary": summary, "responses": responses}
    if open_to_all:
        found["security"] = []
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": _reference(body)}}}
    return found


def _answers() -> dict[str, Schema]:
    fields = {
        "message": STRING, "type": {"enum": sorted(set(TYPES.values()))}, "param": {"type": ["string", "null"]},
        "code": STRING,
    }  # fmt: skip
    error = _object(fields, optional={"index": {"type": "integer"}})
    whole: Schema = {"type": "integer"}
    value: Schema = {"anyOf": [NUMBERS, STRING]}
    several: Schema = {"type": "object", "additionalProperties": value}
    usage = _object({"total_tokens": whole, "prompt_tokens": whole})
    embedding = _object({"object": {"const": "embedding"}, "index": whole, "embedding": {"anyOf": [value, several]}})
    failed = _object({"object": {"const": "error"}, "index": whole, "error": error})
    result = _object({"index": whole, "probability": {"type": "number"}, "cosine": {"type": "number"}})
    ranking = _object({"object": {"const": "ranking"}, "index": whole, "results": {"type": "array", "items": result}})
    lists = {"model": STRING, "object": {"const": "list"}, "usage": usage}
    return {
        "EmbeddingAnswer": _object({**lists, "data": {"type": "array", "items": {"anyOf": [embedding, failed]}}}),
        "RankAnswer": _object({**lists, "data": {"type": "array", "items": ranking}}),
        "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": {"type": "object"}}}),
        "Health": _object({"status": {"enum": ["ok", "draining", "failing"]}, "towers": {"type": "object"}}),
        "Ready": _object({"status": {"const": "ok"}}),
        "Anything": {"type": "object"},
        "Error": _object({"detail": STRING, "error": error}),
    }


def _object(fields: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "properties": {**fields, **(optional or {})}, "required": list(fields)}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><td>{left}<td>{right}" for left, right in rows) + "</table>"


def _text(words: str) -> str:
    return html.escape(str(words))
