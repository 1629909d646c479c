"""What both completion routes do: read, check, submit, and answer whole or in events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from paceline.log import get_logger
from paceline.serve.body import read_body
from paceline.serve.errors import as_api_error
from paceline.serve.generation import Generation, close_all, now, run_all, submit_all, usage_of
from paceline.serve.protocol.common import Usage
from paceline.serve.protocol.sampling import SamplingFields
from paceline.serve.requests import INLINE_BYTES, new_id
from paceline.serve.service import Service
from paceline.serve.streaming import EventStream, json_response, unless_gone

log = get_logger(__name__)

Body = TypeVar("Body", bound=SamplingFields)


@dataclass(frozen=True)
class Answering(Generic[Body]):
    """A request that the engine has taken, and what its answer is made of."""

    service: Service
    body: Body
    request_id: str
    created: int
    generations: list[Generation]

    @property
    def model_name(self) -> str:
        """What the client called the model, or its first name."""
        return self.body.model or self.service.model_name

    def usage(self, *, last: bool) -> Usage | UnsetType | None:
        """What a chunk of the stream says of it: nothing unless asked; then null, but in the last chunk or in all."""
        if not self.body.include_usage:
            return UNSET
        return usage_of(self.generations) if last or self.body.usage_in_every_chunk else None


async def answer_request(
    request: Request,
    kind: type[Body],
    prefix: str,
    make: Callable[[Body, Service, str], list[Generation]],
    *,
    whole: Callable[[Answering[Body]], msgspec.Struct],
    events: Callable[[Answering[Body]], AsyncGenerator[bytes, None]],
    names: Mapping[str, str],
    operation: str,
) -> Response:
    """`make` the generations of a body, and answer with `whole` of them or with their `events`. `names`: what the
    client calls a field that an error names otherwise. `operation`: what traces call it."""
    service: Service = request.app.state.service
    body, size = await read_body(request, kind, limit=service.settings.max_body_bytes)
    service.check_model(body.model)
    service.check_generates()
    request_id = new_id(prefix)
    try:
        if size <= INLINE_BYTES:
            generations = make(body, service, request_id)
        else:
            generations = await asyncio.to_thread(make, body, service, request_id)
    except Exception as error:
        if getattr(body, "max_completion_tokens", None) is not None:
            names = {**names, "max_tokens": "max_completion_tokens"}
        raise as_api_error(error, names, kind.model_fields) from error
    answering = Answering(service, body, request_id, now(), generations)
    if service.tracer is not None:
        for generation in generations:
            generation.trace = service.tracer.prompt(operation, answering.model_name, request.headers)
    _log_request(request.state.request_id, answering)
    if body.stream:
        await unless_gone(request, submit_all(service.client, generations))
        return EventStream(events(answering), partial(close_all, generations))
    await unless_gone(request, _run(service, generations))
    return json_response(whole(answering))


async def _run(service: Service, generations: list[Generation]) -> None:
    await submit_all(service.client, generations)
    await run_all(generations)


def _log_request(http_id: str, answering: Answering[Body]) -> None:
    """One line a request, under the id that the gate logs and the one that the answer has; what the request says only
    where the operator asked for it."""
    tokens = [len(generation.request.prompt_token_ids) for generation in answering.generations]
    log.info("%s is %s: %d prompt tokens in %d prompts", http_id, answering.request_id, sum(tokens), len(tokens))
    if answering.service.settings.log_prompts:
        for generation in answering.generations:
            log.info("%s: %r %s", answering.request_id, generation.state.prompt, generation.request.params)
