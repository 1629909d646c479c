"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from paceline.serve.body import read_body
from paceline.serve.errors import as_api_error, bad_request
from paceline.serve.openapi import documented
from paceline.serve.protocol.tokenize import DetokenizeRequest, Text, TokenizeRequest, Tokens
from paceline.serve.requests import render
from paceline.serve.service import Service
from paceline.serve.streaming import json_response

router = APIRouter(tags=["Tokens"])


@router.post("/tokenize", **documented(TokenizeRequest, Tokens))
async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of a conversation as the chat template writes it."""
    service: Service = request.app.state.service
    body, _ = await read_body(request, TokenizeRequest, limit=service.settings.max_body_bytes)
    service.check_model(body.model)
    service.check_extras(body.model_extra, {}, ())
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt", "missing_required_parameter")
    try:
        ids = await asyncio.to_thread(_encode, body, service)
    except Exception as error:
        raise as_api_error(error, fields=TokenizeRequest.model_fields) from error
    model = service.model
    strings = [model.tokenizer.token_string(i) for i in ids] if body.return_token_strs else UNSET
    return json_response(Tokens(len(ids), model.info.max_model_len, ids, strings))


def _encode(body: TokenizeRequest, service: Service) -> list[int]:
    tokenizer = service.model.tokenizer
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, True if body.add_special_tokens is None else body.add_special_tokens)
    return tokenizer.encode(render(body, service), bool(body.add_special_tokens))


@router.post("/detokenize", **documented(DetokenizeRequest, Text))
async def detokenize(request: Request) -> Response:
    """The text of token ids, special ones included."""
    service: Service = request.app.state.service
    body, _ = await read_body(request, DetokenizeRequest, limit=service.settings.max_body_bytes)
    service.check_model(body.model)
    service.check_extras(body.model_extra, {}, ())
    model = service.model
    outside = next((i for i in body.tokens if not 0 <= i < model.info.vocab_size), None)
    if outside is not None:
        last = model.info.vocab_size - 1
        raise bad_request(f"tokens holds {outside}, but the vocabulary ends at {last}", "tokens")
    text = await asyncio.to_thread(model.tokenizer.decode, body.tokens, False)
    return json_response(Text(text))
