"""A streamed chat, as any server of OpenAI's API sends it: the request's body, and what its events say when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from paceline.benchmark.http_client import Response

_SHOWN_CHARS = 200  # of an error's text
# Where a chunk's text is: an answer, what was thought before it (vLLM's old and new name), or a call of a tool.
_TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls")


def chat_body(model: str, text: str, num_tokens: int, *, stream: bool, ignore_eos: bool) -> bytes:
    """A greedy request for `num_tokens` tokens; all of them with `ignore_eos`, which vLLM's family knows."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": num_tokens,
        "temperature": 0,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if ignore_eos:
        body["ignore_eos"] = True
    return json.dumps(body).encode()


@dataclass(frozen=True)
class ChatStream:
    """What a stream said. `times`: when each chunk with text came, on the clock of `Response.pieces`. Token counts are
    the server's, None where it told none. `error`: why there is no whole answer."""

    times: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None


class _Choice(msgspec.Struct):
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


# Not json: chunks are parsed while other streams go on, and what that takes is added to their times.
_chunk = msgspec.json.Decoder(_Chunk)


def read_stream(response: Response) -> ChatStream:
    if response.status != 200:
        return ChatStream(error=f"{response.status}: {error_text(response.body)}")
    times: list[float] = []
    usage = _Usage()
    finished = False
    for time, data in _events(response):
        if data == b"[DONE]":
            break
        try:
            chunk = _chunk.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return ChatStream(error=f"an event is no chunk of a chat: {_shown(data)}")
        if chunk.error is not None:
            return ChatStream(tuple(times), error=error_text(data))
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta and any(choice.delta.get(name) for name in _TEXTS):
                times.append(time)
            finished = finished or choice.finish_reason is not None
    error = None if finished else "the stream ended before the answer did"
    return ChatStream(tuple(times), usage.prompt_tokens, usage.completion_tokens, error)


def _events(response: Response) -> Iterator[tuple[float, bytes]]:
    """Each event's data, with the time at which its last byte came."""
    rest = b""
    for time, piece in response.pieces:
        *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
            if data:
                yield time, data


def error_text(body: bytes) -> str:
    """What an error's body says: OpenAI's message where there is one."""
    try:
        return str(json.loads(body)["error"]["message"])[:_SHOWN_CHARS]
    except (ValueError, LookupError, TypeError):
        return _shown(body)


def _shown(data: bytes) -> str:
    return " ".join(data.decode(errors="replace").split())[:_SHOWN_CHARS]
