"""What every request passes first: its id, the API key, whether the server takes requests, and being counted."""

from __future__ import annotations

import hmac
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.log import get_logger
from paceline.serve.errors import CLIENT_CLOSED_REQUEST, ApiError, as_api_error, unavailable
from paceline.serve.service import Service

log = get_logger(__name__)

# Probes and scrapers have no key, and are answered while the server drains.
OPEN = frozenset(
    [
        "/health",
        "/health/live",
        "/health/ready",
        "/ping",
        "/metrics",
        "/version",
        "/startup",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
    ]
)
_MOST_ID_CHARS = 128


class Gate:
    """Plain ASGI: Starlette's BaseHTTPMiddleware would put a queue between a stream and its socket, and hide a client's
    leaving from the route."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = tuple(key.encode() for key in service.settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_CLOSED_REQUEST
        start = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        refusal = None if scope["path"] in OPEN else self._refusal(scope, headers)
        if refusal is not None:
            await refusal.response()(scope, receive, send_with_id)
            self._count(scope, status)
            return
        counted = scope["path"] not in OPEN
        self._service.num_in_flight += counted
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if status != CLIENT_CLOSED_REQUEST:
                raise  # too late for another answer: uvicorn closes the connection
            await as_api_error(error).response()(scope, receive, send_with_id)
        finally:
            self._service.num_in_flight -= counted
            self._count(scope, status)
            if counted:
                milliseconds = 1000 * (time.perf_counter() - start)
                log.info("%s %s %s: %d in %.0f ms", request_id, scope["method"], scope["path"], status, milliseconds)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if self._keys and scope["method"] != "OPTIONS":  # a browser asks CORS's question without the key
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode("latin-1", "replace")
            # Every key is compared, so that the time says nothing.
            known = sum(hmac.compare_digest(given, one) for one in self._keys)
            if scheme.lower() != "bearer" or not known:
                said = "no API key was given" if not given else "this API key is not known"
                return ApiError(
                    401,
                    f"{said}: send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self._service.failure is not None:
            return as_api_error(self._service.failure)
        if self._service.draining:
            return unavailable("the server is ending and takes no more requests", "shutting_down")
        return None

    def _count(self, scope: Scope, status: int) -> None:
        # The route's pattern, not the path: a path per model name or typing error would each be a series.
        route = scope.get("route")
        self._service.metrics.http_finished(getattr(route, "path", "none"), _method(scope["method"]), status)


def _method(given: str) -> str:
    return given if given in ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH") else "other"


def _request_id(given: str | None) -> str:
    """The client's own where it is short and plain, so that it can stand in a header and in a log line."""
    if given and len(given) <= _MOST_ID_CHARS and given.isascii() and given.isprintable():
        return given
    return f"req-{uuid.uuid4().hex}"
