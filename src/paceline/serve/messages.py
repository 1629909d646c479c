"""What an engine and its clients tell each other: msgspec structs, as msgpack where they cross a process.

Arrays, not maps: a token is one short array in the one message that a step sends to a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from paceline.engine.step import FinishReason, RequestUpdate
from paceline.sampling.logprobs import TokenLogprobs
from paceline.serve.client import AnswerUpdate, EncodeRequest, EngineCounters, GenerateRequest, ModelInfo, Startup

# --------------------------------------------------------------------------------------------- to the engine


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A client is there: answered by Ready or LoadFailed."""


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """`number` comes back with the answer: an id may be used again while messages about its first use are on their way.

    `seed` and `sent` resume a request that another engine had begun: what each answer has, None for one that ended. It
    was admitted once, so no bound of the queue refuses it.
    """

    number: int
    request: GenerateRequest
    seed: int | None = None
    sent: tuple[tuple[int, ...] | None, ...] | None = None


class Encode(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Texts for an encoder. `number` and `resumed` as in Submit: what another engine had taken, no bound refuses."""

    number: int
    request: EncodeRequest
    resumed: bool = False


class EndAnswer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    request_id: str
    index: int


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    request_id: str


class Forget(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A client is gone for good: its requests are aborted, and none of its messages that come late is heeded."""

    client: bytes


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End the process, whatever runs."""


ToEngine = Hello | Submit | Encode | EndAnswer | Abort | Forget | Shutdown

# --------------------------------------------------------------------------------------------- from the engine


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An error of paceline.errors: the name of its class, and its line. `retry_after`: a QueueFullError's."""

    kind: str
    message: str
    retry_after: float = 0.0


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    info: ModelInfo


class LoadFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    failure: Failure


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Precedes all that the request's steps give. `seed`: the one that it samples with."""

    request_id: str
    number: int
    seed: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    request_id: str
    number: int
    failure: Failure


class Details(msgspec.Struct, frozen=True, array_like=True):
    """What few updates have: see RequestUpdate."""

    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    error: str | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    score: float | None
    cumulative_logprob: float | None
    queue_seconds: float | None


NOTHING = Details((), None, None, None, None, None, None, None)


class Event(msgspec.Struct, frozen=True, array_like=True):
    """What one step changed for one answer."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    num_cached_tokens: int = 0
    details: Details | None = None


class StepEvents(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """All that one step changed for one client's requests."""

    events: Sequence[Event]


class Encoded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An Encode is done: see client.Encoding."""

    request_id: str
    number: int
    rows: bytes
    queue_seconds: float


FromEngine = Ready | LoadFailed | Accepted | Refused | StepEvents | Encoded


class Load(msgspec.Struct, frozen=True, array_like=True):
    """What an engine has to do, and has done since its own start. `running` and `waiting` count requests."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    kv_usage: float = 0.0
    counters: EngineCounters = EngineCounters()


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """Sent from a thread of its own several times a second, whatever the engine does. `last_step_age`: seconds since
    the last step ended. `stuck_seconds`: the same, or since work came where that was later; None without work."""

    startup: Startup
    load: Load
    stuck_seconds: float | None = None
    last_step_age: float | None = None


encode = msgspec.msgpack.Encoder().encode
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)
_beat = msgspec.msgpack.Decoder(Beat)


def decode_to_engine(data: bytes) -> ToEngine:
    message: ToEngine = _to_engine.decode(data)
    return message


def decode_from_engine(data: bytes) -> FromEngine:
    message: FromEngine = _from_engine.decode(data)
    return message


def decode_beat(data: bytes) -> Beat:
    return _beat.decode(data)


def event_of(request_id: str, index: int, update: RequestUpdate, queue_seconds: float | None) -> Event:
    """An engine's update for the wire."""
    details: Any = Details(
        tuple(update.logprobs),
        update.finish_reason,
        update.stop_reason,
        update.error,
        update.prompt_logprobs,
        update.score,
        update.cumulative_logprob,
        queue_seconds,
    )
    return Event(
        request_id, index, update.new_token_ids, update.num_cached_tokens, None if details == NOTHING else details
    )


def update_of(event: Event) -> AnswerUpdate:
    """The same update on the other side."""
    rest = event.details
    if rest is None:
        plain = RequestUpdate(event.request_id, event.token_ids, num_cached_tokens=event.num_cached_tokens)
        return AnswerUpdate(event.index, plain)
    update = RequestUpdate(
        request_id=event.request_id,
        new_token_ids=event.token_ids,
        logprobs=rest.logprobs,
        finish_reason=rest.finish_reason,
        stop_reason=rest.stop_reason,
        error=rest.error,
        num_cached_tokens=event.num_cached_tokens,
        prompt_logprobs=rest.prompt_logprobs,
        score=rest.score,
        cumulative_logprob=rest.cumulative_logprob,
    )
    return AnswerUpdate(event.index, update, rest.queue_seconds)
