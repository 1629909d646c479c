"""GET /v1/models: every name that the model is served under."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from paceline.serve.openapi import documented
from paceline.serve.protocol.models import ModelCard, ModelList
from paceline.serve.service import Service
from paceline.serve.streaming import json_response

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", **documented(None, ModelList))
async def list_models(request: Request) -> Response:
    """The models that requests may name."""
    service: Service = request.app.state.service
    return json_response(ModelList([_card(service, name) for name in service.settings.served_model_names]))


@router.get("/v1/models/{name:path}", **documented(None, ModelCard, path="name"))
async def retrieve_model(request: Request) -> Response:
    """One of them."""
    name: str = request.path_params["name"]
    service: Service = request.app.state.service
    service.check_model(name)
    return json_response(_card(service, name))


def _card(service: Service, name: str) -> ModelCard:
    info = service.model.info if service.is_loaded else None
    root = service.model_name if info is None else info.model
    return ModelCard(name, service.created, root, None if info is None else info.max_model_len)
