"""The OpenAPI 3.1 description of the server, and an HTML page of it that works without JavaScript.

The file openapi.json beside this one describes the paths and the responses. The request bodies are described by their
classes, with the values that this server accepts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinaclip.server.apis.items import TEXT_CHARACTERS
from jinaclip.server.apis.requests import EmbeddingRequest, RankRequest, Request, Rules

Schema = dict[str, Any]

STYLE = "body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto}td{padding:0 1em 0 0;vertical-align:top}"
ERROR_BODY = '{"detail": text, "error": {message, type, param, code}}'


def description(rules: Rules, max_tokens: int, *, keyed: bool) -> Schema:
    """The OpenAPI document of a server.

    Args:
        rules: the values that requests may contain.
        max_tokens: the most tokens in a text.
        keyed: True if clients must send an API key.
    """
    document: Schema = json.loads(files("jinaclip.server").joinpath("openapi.json").read_text("utf-8"))
    about = (
        f"Embeddings of texts (up to {max_tokens} tokens) and images in one vector space. "
        f"Dimensions: {', '.join(map(str, rules.dims))}. "
        f"Models: {', '.join(rules.model_names)}. Tasks: {', '.join(rules.tasks) or 'none'}."
    )
    document["info"] |= {"version": version("jinaclip"), "description": about}
    document["security"] = [{"bearer": []}] if keyed else []
    schemas = document["components"]["schemas"]
    schemas["Text"]["maxLength"] = TEXT_CHARACTERS
    if rules.accept_token_ids:
        schemas["Item"]["anyOf"].append(_reference("TokenIds"))
        schemas["TextItem"]["anyOf"].append(_reference("TokenIds"))
    schemas["EmbeddingRequest"] = _request_schema(EmbeddingRequest, rules)
    schemas["RankRequest"] = _request_schema(RankRequest, rules)
    return document


def page(document: Schema) -> str:
    """The OpenAPI document as an HTML page."""
    info, components = document["info"], document["components"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>jinaclip</title><style>{STYLE}</style>",
        f"<h1>jinaclip {escape(info['version'])}</h1><p>{escape(info['description'])}</p>",
    ]
    for path, operations in document["paths"].items():
        ((method, operation),) = operations.items()
        parts.append(f"<h2>{method.upper()} {path}</h2><p>{escape(operation['summary'])}</p>")
        if "requestBody" in operation:
            body = operation["requestBody"]["content"]["application/json"]
            fields = components["schemas"][body["schema"]["$ref"].rpartition("/")[2]]["properties"]
            parts.append(_table((f"<code>{name}</code>", field["description"]) for name, field in fields.items()))
            parts.append(f"<pre>{escape(json.dumps(body['example'], ensure_ascii=False, indent=2))}</pre>")
    parts.append(f"<h2>Errors</h2><p><code>{ERROR_BODY}</code></p>")
    parts.append(_table((status, response["description"]) for status, response in components["responses"].items()))
    return "".join(parts) + "<p><a href=/openapi.json>openapi.json</a></html>"


def _request_schema(request: type[Request], rules: Rules) -> Schema:
    """The schema of a request body, with the dimensions, model names and tasks of this server."""
    any_task = {"type": ["string", "null"]}
    accepted: Schema = {
        "dimensions": {"enum": [*rules.dims, *map(str, rules.dims), None]},
        "model": {"enum": [*rules.model_names, None]},
        "task": any_task if rules.ignore_unknown_tasks else {"enum": [*rules.tasks, "", None]},
        "input": _one_or_more("Item", rules.max_items),
        "texts": _one_or_more("TextItem", rules.max_items),
        "images": _one_or_more("ImageItem", rules.max_items),
    }
    schema = request.model_json_schema()
    for name, field in schema["properties"].items():
        field.pop("title", None)
        if name in accepted:
            schema["properties"][name] = {**accepted[name], "description": field["description"]}
    return schema


def _one_or_more(name: str, max_items: int) -> Schema:
    items = {"type": "array", "items": _reference(name), "minItems": 1, "maxItems": max_items}
    return {"anyOf": [_reference(name), items]}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """An HTML table of two columns; the first is HTML, the second is text."""
    return "<table>" + "".join(f"<tr><td>{first}<td>{escape(second)}" for first, second in rows) + "</table>"
