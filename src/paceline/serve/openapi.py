"""/openapi.json: routes read their bodies themselves (serve/body.py), so what these hold is told here."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from paceline.serve.protocol.chat import ChatCompletion, ChatCompletionRequest
from paceline.serve.protocol.classify import Classifications, ClassifyRequest
from paceline.serve.protocol.completions import Completion, CompletionRequest
from paceline.serve.protocol.embeddings import Embeddings, EmbeddingsRequest
from paceline.serve.protocol.models import ModelCard, ModelList
from paceline.serve.protocol.rerank import Ranking, RerankRequest
from paceline.serve.protocol.score import ScoreRequest, Scores
from paceline.serve.protocol.tokenize import DetokenizeRequest, Text, TokenizeRequest, Tokens
from paceline.serve.version import VERSION

_REF = "#/components/schemas/{name}"
_REQUESTS: tuple[type[BaseModel], ...] = (
    *(ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest),
    *(EmbeddingsRequest, RerankRequest, ScoreRequest, ClassifyRequest),
)
_ANSWERS: tuple[type[msgspec.Struct], ...] = (
    *(ChatCompletion, Completion, ModelCard, ModelList, Tokens, Text),
    *(Embeddings, Ranking, Scores, Classifications),
)
_FAILURES = {
    400: "A value that cannot be right; `param` names it.",
    401: "No valid API key.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too much is waiting; see Retry-After.",
    500: "This request failed; others go on.",
    503: "Loading, restarting or ending; see Retry-After.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
# Of each event: `data` is a chunk's JSON, an error's, or [DONE].
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}


def documented(
    body: type[BaseModel] | None, answer: type[msgspec.Struct], *, stream: bool = False, path: str | None = None
) -> dict[str, Any]:
    """A route's options that tell of its body, its answer, its failures and the parameter in its `path`."""
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}}
    if stream:
        content["text/event-stream"] = {"schema": _EVENT}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    for status, text in _FAILURES.items():
        if body is not None or status in (401, 404, 500):
            responses[str(status)] = _failure(text)
    extra: dict[str, Any] = {"responses": responses}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    if path is not None:
        extra["parameters"] = [{"name": path, "in": "path", "required": True, "schema": {"type": "string"}}]
    return {"openapi_extra": extra, "response_model": None}


def _failure(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}}


NOT_READY: dict[int | str, dict[str, Any]] = {503: _failure("Not now; the message says why.")}


def install(app: FastAPI) -> None:
    """Let `app.openapi()` have the schemas that `documented` refers to."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title="paceline", version=VERSION, routes=app.routes)
            document.setdefault("components", {})["schemas"] = _schemas()
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _schemas() -> dict[str, Any]:
    _, requests = models_json_schema(
        [(kind, "validation") for kind in _REQUESTS], ref_template=_REF.replace("{name}", "{model}")
    )
    _, answers = msgspec.json.schema_components(_ANSWERS, ref_template=_REF)
    return {**requests["$defs"], **answers, "Error": _ERROR}


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}
