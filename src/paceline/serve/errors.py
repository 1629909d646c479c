"""Every failure as OpenAI's nested error object: `{"error": {"message", "type", "param", "code"}}` and its status."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Container, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from paceline.errors import (
    ChatTemplateError,
    EngineDeadError,
    PacelineError,
    PromptTooLongError,
    QueueFullError,
    UsageError,
)
from paceline.log import get_logger

log = get_logger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's; seen in the log only, for nobody is there to read it
RETRY_AFTER_UNAVAILABLE = 1  # seconds: a start or a restart takes a few, and asking costs nothing
_MOST_MESSAGE_CHARS = 2000  # what a client sent may be quoted in it
# A parameter's error begins with its name; a message's with where it is, as in "messages[2].content".
_PARAM = re.compile(r"(?:each id of )?([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*)(?![\w.\[])")


class ApiError(PacelineError):
    """A failure as a client is told of it. `param`: the field at fault; `code`: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's word for this kind of failure."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> bytes:
        """The error object. In ASCII, since what a client sent and is quoted here need not be valid Unicode."""
        message = str(self)[:_MOST_MESSAGE_CHARS]
        error = {"message": message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str) -> ApiError:
    """The server cannot answer now and will later: it loads, restarts or ends."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_UNAVAILABLE)})


def as_api_error(error: BaseException, names: Mapping[str, str] | None = None, fields: Container[str] = ()) -> ApiError:
    """Any failure as an ApiError. `fields`: those of the request, one of which may be at fault; `names`: what the
    client calls one where that is not the engine's name for it.

    What nobody raised on purpose is a bug: its traceback is logged, and the client is told no more than its kind.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(max(1, round(error.retry_after)))}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, EngineDeadError):
        return unavailable(str(error), "engine_unavailable")
    if isinstance(error, PromptTooLongError):
        return bad_request(str(error), (names or {}).get("prompt", "prompt"), "context_length_exceeded")
    if isinstance(error, (UsageError, ChatTemplateError)):
        return _from_usage(error, names or {}, fields)
    if isinstance(error, HTTPException):
        return _from_http(error)
    if isinstance(error, PacelineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, asyncio.CancelledError):
        return unavailable("the server is ending", "shutting_down")
    log.error("a request failed: a bug in paceline", exc_info=error)
    return ApiError(500, f"internal error ({type(error).__name__}); the server's log has more", code="internal_error")


def _from_usage(error: UsageError, names: Mapping[str, str], fields: Container[str]) -> ApiError:
    message = str(error)
    found = _PARAM.match(message)
    param = found.group(1) if found else None
    if param in names:
        assert param is not None
        assert found is not None
        message = message[: found.start(1)] + names[param] + message[found.end(1) :]
        param = names[param]
    # A sentence begins with a word, too.
    return bad_request(message, param if param and re.split(r"[\[.]", param)[0] in fields else None)


def _from_http(error: HTTPException) -> ApiError:
    said = {404: "there is no such endpoint; /docs lists them", 405: "this endpoint does not take that method"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    message, code = said.get(error.status_code, str(error.detail)), codes.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=error.headers)


def install(app: FastAPI) -> None:
    """Answer what is raised on purpose with its error object. The rest, bugs, is the gate's."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    handlers: dict[Any, Callable[..., Any]] = {
        ClientDisconnect: gone,
        PacelineError: answer,
        HTTPException: answer,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
