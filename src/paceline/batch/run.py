"""A batch through the server's own application, without a socket: what a line gives is what a client would be told."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from starlette.types import ASGIApp, Message

from paceline.batch.files import Answers, BatchAnswer, BatchRequest, BatchResponse, Requests
from paceline.errors import EngineError
from paceline.serve.app import create_app
from paceline.serve.errors import bad_request
from paceline.serve.service import Service
from paceline.serve.tasks import run_together

ATTEMPTS = 3  # at a request during which engines die
POLL_SECONDS = 0.2  # while an engine is started anew


@dataclass
class Progress:
    """What a run has done so far."""

    num_answers: int = 0
    num_tokens: int = 0  # generated


class _Body(msgspec.Struct):
    stream: bool | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Answered(msgspec.Struct):
    usage: _Usage = msgspec.field(default_factory=_Usage)


async def run_batch(
    service: Service, requests: Requests, answers: Answers, told: Callable[[Progress], None] = lambda progress: None
) -> Progress:
    """Load the model and answer what `answers` does not have yet. `told` is called after each answer.

    Raises what the load failed with, EngineError where the engine dies for good, and OSError where an answer cannot be
    written. Whatever comes, the answers that are written are whole.
    """
    left = iter([place for place in requests.places if place.custom_id not in answers.answered])
    progress = Progress()

    async def work(app: ASGIApp) -> None:
        for place in left:
            answer = await _answer(app, service, requests.read(place))
            answers.add(answer)
            progress.num_answers += 1
            progress.num_tokens += _num_tokens(answer.response)
            told(progress)

    try:
        await service.start()
        if service.failure is not None:
            raise service.failure
        app = create_app(service)
        # As many again as the engine works on wait, so that no place of its batch stays free.
        await run_together(work(app) for _ in range(2 * service.model.info.max_num_seqs))
    finally:
        await service.close()
    return progress


async def _answer(app: ASGIApp, service: Service, request: BatchRequest) -> BatchAnswer:
    if _streams(request):
        refusal = bad_request("a batch has no streams: leave stream out", "stream", "unsupported_parameter")
        response = BatchResponse(refusal.status, f"req-{uuid.uuid4().hex}", msgspec.Raw(refusal.body()))
    else:
        for _ in range(ATTEMPTS):
            response = await ask(app, request)
            if response.status_code != 503:
                break
            await _until_ready(service)
    return BatchAnswer(f"batch_req_{uuid.uuid4().hex}", request.custom_id, response)


def _streams(request: BatchRequest) -> bool:
    try:
        return bool(msgspec.json.decode(request.body, type=_Body).stream)
    except msgspec.ValidationError:
        return False  # the endpoint's to refuse


async def _until_ready(service: Service) -> None:
    while service.not_ready is not None:
        if not service.client.status().alive:
            raise EngineError(f"{service.not_ready}: run the same command again to go on")
        await asyncio.sleep(POLL_SECONDS)


async def ask(app: ASGIApp, request: BatchRequest) -> BatchResponse:
    """The application's answer."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.url,
        "raw_path": request.url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    incoming = [{"type": "http.request", "body": bytes(request.body), "more_body": False}]
    status, headers, body = 0, {}, bytearray()

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await asyncio.Event().wait()  # nobody leaves
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message["headers"])
        else:
            body.extend(message.get("body", b""))

    await app(scope, receive, send)
    return BatchResponse(status, headers[b"x-request-id"].decode(), msgspec.Raw(body))


def _num_tokens(response: BatchResponse) -> int:
    try:
        return msgspec.json.decode(response.body, type=_Answered).usage.completion_tokens
    except msgspec.ValidationError:
        return 0
