"""Server-sent events as OpenAI sends them, and noticing that a client has left, streaming or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from paceline.serve.errors import as_api_error
from paceline.serve.tasks import cancel

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def event(value: msgspec.Struct) -> bytes:
    """One chunk. JSON has no raw line ends, so it is one line."""
    return b"data: " + _encode(value) + b"\n\n"


def json_response(value: msgspec.Struct, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(value), 200, headers, "application/json")


class EventStream(Response):
    """A response whose events are sent as they come. A failure after the start is an event, then [DONE].

    Starlette's own StreamingResponse is not used: it holds a failure back until the connection breaks. A client that
    leaves ends `events` within the loop's turn, wherever it waits.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]]) -> None:
        """`close` is awaited at the end, however that comes, and even if `events` never began."""
        # The buffering of a reverse proxy (nginx) would hold tokens back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(None, 200, headers)
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _first_of(asyncio.ensure_future(self._send(send)), receive)
        except ClientDisconnect:
            pass
        finally:
            await self._events.aclose()
            await self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = DONE
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            last = b"data: " + as_api_error(error).body() + b"\n\n" + DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves: ClientDisconnect then. Starlette cancels no
    handler by itself. The body must have been read."""
    return await _first_of(asyncio.ensure_future(work), request.receive)


async def _first_of(task: asyncio.Future[T], receive: Receive) -> T:
    leaving = asyncio.ensure_future(_until_gone(receive))
    both: set[asyncio.Future[Any]] = {task, leaving}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        await cancel(*both)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
