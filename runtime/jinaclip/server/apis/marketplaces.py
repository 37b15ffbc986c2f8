"""Endpoints of the marketplaces Amazon SageMaker and Google Vertex AI: their paths and bodies.

Both platforms start a container, check its health at one path and send requests to another. A request is converted to
the format of POST /v1/embeddings and answered in the same way.

    SageMaker   GET /ping and POST /invocations, port 8080. Body: {"data": [item, …], "parameters": {…}}, as sent by
                the publisher's client, or the body of /v1/embeddings.
    Vertex AI   Paths and port from AIP_HEALTH_ROUTE, AIP_PREDICT_ROUTE and AIP_HTTP_PORT. Body:
                {"instances": [item, …], "parameters": {…}}. Response: {"predictions": […]}.

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
    """The endpoint that a marketplace expects.

    Attributes:
        name: one of MARKETPLACES.
        port: the port that the platform connects to.
        health, predict: the paths for health checks and requests.
        items: the name of the request field with the items.
    """

    name: str
    port: int
    health: str
    predict: str
    items: str

    def request(self, body: Any) -> tuple[Any, str]:
        """Convert a request body to the format of POST /v1/embeddings.

        Returns:
            The converted body, and the client's name of the field with the items.

        Raises:
            Problem: 422, the body does not have the expected format.
        """
        if not isinstance(body, dict) or (self.name == "sagemaker" and "input" in body):
            return body, "input"  # the format of /v1/embeddings, or an error that is reported there
        if self.items not in body:
            what = f"{self.items} is missing; expected a list of texts and images"
            raise invalid(self.items, what, code="missing_field")
        for name in sorted(set(body) - {self.items, "parameters"}):
            what = f"{name!r:.80} is not a field of this request; expected {self.items} and parameters"
            raise invalid(name, what, code="unknown_field")
        parameters = {} if body.get("parameters") is None else body["parameters"]
        if not isinstance(parameters, dict):
            raise invalid("parameters", f"parameters is {kind_of(parameters)}, expected an object")
        if "input" in parameters:
            raise invalid("parameters", f"parameters contains input; send the items in {self.items}")
        return {**parameters, "input": body[self.items]}, self.items

    def answer(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Convert a response of POST /v1/embeddings to the format of the marketplace."""
        return {"predictions": answer["data"]} if self.name == "vertex" else answer


def marketplace(name: str, environment: Mapping[str, str]) -> Marketplace:
    """The endpoint of a marketplace, as configured by the environment variables of its container.

    Args:
        name: one of MARKETPLACES.
        environment: the environment variables.

    Raises:
        InputError: an environment variable has an invalid value.
    """
    if name == "sagemaker":
        return Marketplace(name, PORT, "/ping", "/invocations", "data")
    port = environment.get("AIP_HTTP_PORT") or str(PORT)
    health = environment.get("AIP_HEALTH_ROUTE") or "/health"
    predict = environment.get("AIP_PREDICT_ROUTE") or "/predict"
    if not (port.isascii() and port.isdecimal()) or not health.startswith("/") or not predict.startswith("/"):
        found = f"AIP_HTTP_PORT, AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE are {port!r}, {health!r} and {predict!r}"
        raise InputError(f"{found}; expected a port number and two paths that begin with /")
    return Marketplace(name, int(port), health, predict, "instances")
