"""What all routes to an encoder do: read, tokenize, have it encoded, and answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
import numpy as np
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from paceline.encoders.description import EncoderInfo
from paceline.encoders.inputs import TextReader, Tokens
from paceline.encoders.results import Rows
from paceline.errors import EngineError
from paceline.log import get_logger
from paceline.serve.body import read_body
from paceline.serve.client import EncodeRequest, Encoding
from paceline.serve.errors import as_api_error
from paceline.serve.generation import now
from paceline.serve.protocol.encoding import INERT, REFUSED, EncodingFields, EncodingUsage
from paceline.serve.requests import INLINE_BYTES, new_id
from paceline.serve.service import Service
from paceline.serve.streaming import json_response, unless_gone

log = get_logger(__name__)

Body = TypeVar("Body", bound=EncodingFields)
Read = TypeVar("Read")


@dataclass(frozen=True)
class Encodable(Generic[Read]):
    """What is to be encoded, and `read`, which a route makes its answer with."""

    texts: list[Tokens]
    read: Read


@dataclass(frozen=True)
class Answering(Generic[Body, Read]):
    """A request whose texts have their rows."""

    body: Body
    info: EncoderInfo
    read: Read
    rows: Rows
    request_id: str
    created: int
    model_name: str
    usage: EncodingUsage


async def answer_encoding(
    request: Request,
    kind: type[Body],
    prefix: str,
    read: Callable[[Body, EncoderInfo, TextReader], Encodable[Read]],
    answer: Callable[[Answering[Body, Read]], msgspec.Struct],
    names: Mapping[str, str],
) -> Response:
    """`read` a body's texts, encode them, `answer`. `names`: what the client calls a field that an error names
    otherwise."""
    service: Service = request.app.state.service
    body, size = await read_body(request, kind, limit=service.settings.max_body_bytes)
    service.check_model(body.model)
    info = service.encoder
    service.check_extras(body.model_extra, REFUSED, INERT)
    reader, small = TextReader(info, service.model.tokenizer), size <= INLINE_BYTES
    try:
        made = read(body, info, reader) if small else await asyncio.to_thread(read, body, info, reader)
    except Exception as error:
        raise as_api_error(error, names, kind.model_fields) from error
    encoded, created = EncodeRequest(new_id(prefix), tuple(made.texts)), now()
    _log_request(request, service, encoded, body)
    encoding = await _encode(request, service, encoded)

    def finish() -> Response:
        rows: Rows = np.frombuffer(encoding.rows, np.float32).reshape(-1, info.size)
        usage = EncodingUsage(encoded.num_tokens, encoded.num_tokens)
        name = body.model or service.model_name
        return json_response(answer(Answering(body, info, made.read, rows, encoded.request_id, created, name, usage)))

    return finish() if small else await asyncio.to_thread(finish)


async def _encode(request: Request, service: Service, encoded: EncodeRequest) -> Encoding:
    """The rows, and the request's times to the metrics. A client that leaves takes its request with it."""
    metrics, arrival = service.metrics, time.perf_counter()
    metrics.prompt_tokens.observe(encoded.num_tokens)
    try:
        encoding = await unless_gone(request, service.client.encode(encoded))
    except EngineError:
        metrics.answer_finished("error")
        raise
    except ClientDisconnect:
        metrics.answer_finished("abort")
        raise
    metrics.queue.observe(encoding.queue_seconds)
    metrics.end_to_end.observe(time.perf_counter() - arrival)
    metrics.answer_finished("stop")
    return encoding


def _log_request(request: Request, service: Service, encoded: EncodeRequest, body: EncodingFields) -> None:
    """As routes/generate.py logs one."""
    http_id, count = request.state.request_id, len(encoded.texts)
    log.info("%s is %s: %d tokens in %d texts", http_id, encoded.request_id, encoded.num_tokens, count)
    if service.settings.log_prompts:
        log.info("%s: %r", encoded.request_id, body)
