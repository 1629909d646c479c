"""The client's books, message by message: the test is the engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from paceline.encoders.inputs import Tokens
from paceline.engine.step import RequestUpdate
from paceline.errors import EngineDeadError, QueueFullError, UsageError
from paceline.serve.client import EncodeRequest, Encoding, GenerateRequest
from paceline.serve.messages import (
    Abort,
    Accepted,
    Encode,
    Encoded,
    EndAnswer,
    Failure,
    Refused,
    StepEvents,
    Submit,
    ToEngine,
    event_of,
)
from paceline.serve.streams import Stream, StreamTable


def step(*tokens: tuple[int, int], finish: Any = None) -> StepEvents:
    return StepEvents([event_of("r", i, RequestUpdate("r", (t,), finish_reason=finish), None) for i, t in tokens])


async def opened(request: GenerateRequest) -> tuple[StreamTable, Stream, list[ToEngine]]:
    """A table, and its one request, accepted."""
    sent: list[ToEngine] = []
    table = StreamTable(sent.append)
    submitting = asyncio.ensure_future(table.submit(request))
    await asyncio.sleep(0)
    (submit,) = sent
    table.receive(Accepted("r", submit.number, 77))
    return table, await submitting, sent


def test_what_arrived_of_an_answer_that_is_ended_is_not_given(run_async, make_request):
    async def play() -> None:
        table, stream, sent = await opened(make_request("r", n=2, temperature=1.0))
        table.receive(step((0, 5), (1, 6)))
        table.receive(step((0, 7), (1, 8)))
        assert (await stream.__anext__()).update.new_token_ids == (5,)
        table.end_answer("r", 0)
        table.receive(step((0, 9), (1, 10), finish="length"))
        assert [(one.index, one.update.new_token_ids) async for one in stream] == [(1, (6,)), (1, (8,)), (1, (10,))]
        assert sent[1:] == [EndAnswer("r", 0)]

    run_async(play())


def test_an_answer_may_be_ended_when_the_engine_has_ended_it(run_async, make_request):
    async def play() -> None:
        table, stream, sent = await opened(make_request("r"))
        table.receive(step((0, 5)))
        table.receive(step((0, 6), finish="length"))
        await stream.__anext__()
        table.end_answer("r", 0)
        assert [one async for one in stream] == []
        assert len(sent) == 1
        assert len(table) == 0

    run_async(play())


def test_an_id_that_is_used_again_gets_nothing_of_its_first_use(run_async, make_request):
    async def play() -> None:
        table, first, sent = await opened(make_request("r"))
        await first.aclose()
        again = asyncio.ensure_future(table.submit(make_request("r")))
        await asyncio.sleep(0)
        table.receive(step((0, 5)))
        table.receive(Accepted("r", first.number, 1))
        table.receive(Refused("r", first.number, Failure("UsageError", "no")))
        await asyncio.sleep(0)
        assert not again.done()
        table.receive(Accepted("r", sent[-1].number, 2))
        table.receive(step((0, 6), finish="length"))
        assert [one.update.new_token_ids async for one in await again] == [(6,)]
        assert [type(message) for message in sent] == [Submit, Abort, Submit]

    run_async(play())


def test_a_submission_that_is_cancelled_is_aborted(run_async, make_request):
    async def play() -> None:
        sent: list[ToEngine] = []
        table = StreamTable(sent.append)
        task = asyncio.ensure_future(table.submit(make_request("r")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sent[1:] == [Abort("r")]
        assert len(table) == 0

    run_async(play())


def test_a_refusal_is_raised_with_its_time(run_async, make_request):
    async def play() -> None:
        sent: list[ToEngine] = []
        table = StreamTable(sent.append)
        task = asyncio.ensure_future(table.submit(make_request("r")))
        await asyncio.sleep(0)
        table.receive(Refused("r", sent[0].number, Failure("QueueFullError", "full", 7.0)))
        with pytest.raises(QueueFullError, match="full") as raised:
            await task
        assert raised.value.retry_after == 7.0

    run_async(play())


def test_the_reader_gets_what_arrived_before_the_error(run_async, make_request):
    async def play() -> None:
        table, stream, _ = await opened(make_request("r"))
        table.receive(step((0, 5)))
        table.fail_all(EngineDeadError("gone"))
        assert (await stream.__anext__()).update.new_token_ids == (5,)
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="gone"):
                await stream.__anext__()

    run_async(play())


def test_a_resumption_says_what_each_answer_has(run_async, make_request):
    async def play() -> None:
        table, stream, sent = await opened(make_request("r", n=3, temperature=1.0))
        table.receive(step((0, 5), (1, 6)))
        table.receive(step((1, 7), finish="stop"))
        table.receive(step((0, 8)))
        table.resume_all()
        assert sent[-1] == Submit(stream.number, stream.request, 77, ((5, 8), None, ()))
        table.resume_all()
        updates = [await stream.__anext__() for _ in range(4)]
        assert [one.index for one in updates] == [0, 1, 1, 0]
        with pytest.raises(EngineDeadError, match="died 2 times while request 'r' ran"):
            await stream.__anext__()

    run_async(play())


TEXT = EncodeRequest("e", (Tokens((1, 2)),))


async def encoding() -> tuple[StreamTable, asyncio.Future[Encoding], list[ToEngine]]:
    """A table, and its one request, to an encoder."""
    sent: list[ToEngine] = []
    table = StreamTable(sent.append)
    waiting = asyncio.ensure_future(table.encode(TEXT))
    await asyncio.sleep(0)
    assert sent == [Encode(0, TEXT)]
    return table, waiting, sent


def test_an_encoding_is_given_to_the_request_of_its_number(run_async):
    async def play() -> None:
        table, waiting, sent = await encoding()
        with pytest.raises(UsageError, match="'e' is in use"):
            await table.encode(TEXT)
        table.receive(Encoded("e", 7, b"another's", 0.0))
        table.receive(Encoded("e", 0, b"rows", 0.5))
        assert await waiting == Encoding(b"rows", 0.5)
        assert len(table) == 0
        assert len(sent) == 1

    run_async(play())


def test_an_encoding_ends_however_its_engine_or_its_reader_does(run_async):
    async def play() -> None:
        table, waiting, sent = await encoding()
        table.abort("e")
        with pytest.raises(EngineDeadError, match="aborted"):
            await waiting
        assert sent[1:] == [Abort("e")]

        table, waiting, sent = await encoding()
        waiting.cancel()
        await asyncio.sleep(0)
        assert sent[1:] == [Abort("e")]
        assert len(table) == 0

        table, waiting, sent = await encoding()
        table.receive(Refused("e", 0, Failure("QueueFullError", "full", 3.0)))
        with pytest.raises(QueueFullError, match="full") as caught:
            await waiting
        assert caught.value.retry_after == 3

        table, waiting, sent = await encoding()
        table.resume_all()
        assert sent[1:] == [Encode(0, TEXT, resumed=True)]
        table.resume_all()
        with pytest.raises(EngineDeadError, match="died 2 times"):
            await waiting

        table, waiting, sent = await encoding()
        await table.drain(0.01)
        with pytest.raises(EngineDeadError, match="shuts down"):
            await waiting
        assert sent[1:] == [Abort("e")]

    run_async(play())
