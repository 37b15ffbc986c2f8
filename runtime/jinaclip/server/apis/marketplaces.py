"""Paths and bodies of the marketplaces' endpoints: Amazon SageMaker and Google Vertex AI.

Both start a container, ask one path for its health and send requests to another. A request is put into the form of
POST /v1/embeddings, and answered as that is.

    SageMaker   GET /ping, POST /invocations, port 8080; body {"data": [item, …], "parameters": {…}} as the
                publisher's own client sends it, or the body of /v1/embeddings as it is
    Vertex AI   paths and port from AIP_HEALTH_ROUTE, AIP_PREDICT_ROUTE, AIP_HTTP_PORT; body
                {"instances": [item, …], "parameters": {…}}, answer {"predictions": […]}

Sources: the container contracts in the two clouds' documentation; the publisher's jina-sagemaker 0.0.48.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinaclip.errors import InputError
from jinaclip.server.apis.items import kind_of
from jinaclip.server.errors import invalid

MARKETPLACES = ("sagemaker", "vertex")
SAGEMAKER_BUNDLE = "/opt/ml/model"  # where SageMaker unpacks a model
PORT = 8080


@dataclass(frozen=True)
class Marketplace:
    """Where one of them asks, and how.

    Attributes:
        name: of MARKETPLACES.
        port: that it connects to.
        health, predict: its paths.
        items: the field of a body that holds the items.
    """

    name: str
    port: int
    health: str
    predict: str
    items: str

    def request(self, body: Any) -> tuple[Any, str]:
        """A body as POST /v1/embeddings takes it, and what the client calls the items.

        Raises:
            Problem: 422.
        """
        if not isinstance(body, dict) or (self.name == "sagemaker" and "input" in body):
            return body, "input"  # the form of /v1/embeddings, or what will be refused there
        if self.items not in body:
            raise invalid(self.items, f"{self.items} is missing; expected a list of texts and images",
                          code="missing_field")  # fmt: skip
        if unknown := set(body) - {self.items, "parameters"}:
            raise invalid(sorted(unknown)[0], f"{sorted(unknown)[0]!r:.80} is no field of this request; expected "
                                              f"{self.items} and parameters", code="unknown_field")  # fmt: skip
        parameters = {} if body.get("parameters") is None else body["parameters"]
        if not isinstance(parameters, dict):
            raise invalid("parameters", f"parameters is {kind_of(parameters)}, expected an object")
        if "input" in parameters:
            raise invalid("parameters", f"parameters has input; expected the items in {self.items}")
        return {**parameters, "input": body[self.items]}, self.items

    def answer(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An answer of POST /v1/embeddings as the marketplace hands it on."""
        return {"predictions": answer["data"]} if self.name == "vertex" else answer


def marketplace(name: str, environment: Mapping[str, str]) -> Marketplace:
    """One of MARKETPLACES, as the environment of its container says.

    Raises:
        InputError: its environment cannot be used.
    """
    if name == "sagemaker":
        return Marketplace(name, PORT, "/ping", "/invocations", "data")
    port = environment.get("AIP_HTTP_PORT") or str(PORT)
    health = environment.get("AIP_HEALTH_ROUTE") or "/health"
    predict = environment.get("AIP_PREDICT_ROUTE") or "/predict"
    if not (port.isascii() and port.isdecimal()) or not health.startswith("/") or not predict.startswith("/"):
        raise InputError(f"AIP_HTTP_PORT, AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE are {port!r}, {health!r} and "
                         f"{predict!r}; expected a number and two paths that begin with /")  # fmt: skip
    return Marketplace(name, int(port), health, predict, "instances")
