"""A request's body: bounded, JSON, and of the model's form. Everything else is a 4xx that says what was wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, ValidationError

from paceline.serve.errors import ApiError, bad_request

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], *, limit: int) -> tuple[Body, int]:
    """The body as a `kind`, and its size in bytes.

    Raises ApiError: 415 for another content type than JSON, 413 for more than `limit` bytes, 400 for what is not valid
    JSON (NaN, lone surrogates and thousands of nested brackets included) or not of the form.
    """
    _check_content_type(request)
    data = await _read(request, limit)
    return parse(data, kind), len(data)


def parse(data: bytes | bytearray, kind: type[Body]) -> Body:
    """See read_body."""
    # Not pydantic's own JSON parser, which takes NaN and tells no position of an error.
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise bad_request("the body is nested too deeply to be read", code="invalid_json") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, not {_json_type(value)}", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _from_validation(error) from None
    except RecursionError:
        raise bad_request("the body is nested too deeply to be read", code="invalid_json") from None


def _check_content_type(request: Request) -> None:
    given = request.headers.get("content-type")
    media = (given or "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise ApiError(
            415,
            f"the body must be application/json, not {media or 'nothing'}: set the Content-Type header",
            code="unsupported_media_type",
        )


async def _read(request: Request, limit: int) -> bytearray:
    said = request.headers.get("content-length", "")
    too_large = ApiError(
        413,
        f"the body has more than {limit} bytes: send less, or start the server with a higher --max-body-bytes",
        code="request_too_large",
        headers={"Connection": "close"},  # or the rest of it would be read to find the next request
    )
    if said.isascii() and said.isdigit() and int(said[:20]) > limit:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise too_large
    return data


def _from_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by its path: "messages[0].content: ..."."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = _path(first["loc"])
    if first["type"] == "missing":
        return bad_request(f"'{param}' is required", param, "missing_required_parameter")
    message = first["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    value = first["input"]
    shown = "" if isinstance(value, (dict, list)) else f", got {_shown(value)}"
    return bad_request(f"{param} {message}{shown}", param, "invalid_type")


def _path(parts: Iterable[Any]) -> str:
    """A field's path as a client would write it. Pydantic adds the alternatives of a union; no field is so called."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "list", "dict"):
            path += f".{part}" if path else part
    return path


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode() if isinstance(value, (str, bool, type(None))) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
