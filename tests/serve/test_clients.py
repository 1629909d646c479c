"""What both clients promise: the engine in a thread, and in a process of its own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from paceline.errors import EngineDeadError, ModelNotFoundError, PromptTooLongError, QueueFullError, UsageError
from paceline.serve.admission import QueueLimits
from paceline.serve.client import EngineClient, GenerateRequest
from paceline.serve.in_process import InProcessClient
from paceline.serve.zmq_client import ZmqClient, supervised

Run = Callable[[Any], Any]
MAX_QUEUE = 80


def in_process(options: Any, **given: Any) -> EngineClient:
    return InProcessClient(options, **given)


def of_a_process(options: Any, **given: Any) -> EngineClient:
    return ZmqClient(supervised(options, **given))


KINDS = [pytest.param(in_process, id="thread"), pytest.param(of_a_process, id="process")]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[..., EngineClient]:
    return request.param


@pytest.fixture(scope="module")
def client(kind: Callable[..., EngineClient], tiny_options: Any, run_async: Run) -> Iterator[EngineClient]:
    made = kind(tiny_options(), limits=QueueLimits(max_requests=MAX_QUEUE), threads=1)
    run_async(made.start())
    yield made
    run_async(made.close())
    assert (made.status().state, made.status().alive) == ("closed", False)


@pytest.fixture
def at_rest(client: EngineClient, until: Callable[..., Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """Until the engine has nothing left, and no block is held."""

    def rests() -> bool:
        status = client.status()
        return status.running == status.waiting == status.waiting_tokens == 0 and status.kv_usage == 0

    return lambda: until(rests)


def test_the_model_is_described(client):
    info = client.info
    assert (info.vocab_size, info.max_model_len, info.max_num_seqs) == (64, 4096, 8)
    assert (info.dtype, info.device, info.num_kv_tokens) == ("float32", "cpu", 8192)
    assert info.generation_config["eos_token_id"] == 2
    assert "weights" in info.phases
    status = client.status()
    assert (status.state, status.alive, status.ready, status.startup.phase) == ("ready", True, True, None)
    assert "weights" in status.startup.phases


def test_64_requests_at_once_give_what_each_gives_alone(client, run_async, collect, make_request, at_rest):
    draw = random.Random(5)
    requests = [
        make_request(f"r{i}", tuple(draw.choices(range(3, 64), k=draw.randint(1, 90))), max_tokens=draw.randint(1, 14))
        for i in range(64)
    ]

    async def all_ways() -> None:
        together = await asyncio.gather(*(collect(client, request) for request in requests))
        alone = [await collect(client, request) for request in requests]
        assert together == alone
        assert [len(tokens[0]) for tokens in alone] == [request.params.max_tokens for request in requests]
        await at_rest()

    run_async(all_ways())


def test_several_answers_and_log_probabilities(client, run_async, make_request):
    request = make_request("r", n=3, temperature=1.0, seed=3, logprobs=2, prompt_logprobs=1, max_tokens=5)

    async def read() -> None:
        updates = [one async for one in await client.submit(request)]
        assert {one.index for one in updates} == {0, 1, 2}
        for index in range(3):
            own = [one.update for one in updates if one.index == index]
            assert [len(update.logprobs) for update in own] == [1] * 5
            assert own[-1].finish_reason == "length"
        assert [len(one.update.prompt_logprobs) for one in updates if one.update.prompt_logprobs is not None] == [2]
        assert sum(one.queue_seconds is not None for one in updates) == 1

    run_async(read())


def test_an_abort_ends_the_stream_and_frees_its_blocks(client, run_async, make_request, at_rest):
    async def leave() -> None:
        stream = await client.submit(make_request("r", max_tokens=3000))
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 3:
                await client.abort("r")
        assert 3 <= seen < 3000  # what had arrived before
        await at_rest()
        await client.abort("r")
        await client.abort("unknown")

    run_async(leave())


@pytest.mark.parametrize("how", ["aclose", "async with", "cancel"])
def test_leaving_a_stream_early_aborts_it(client, run_async, make_request, at_rest, how):
    async def read(started: asyncio.Event) -> None:
        async with await client.submit(make_request("r", max_tokens=3000)) as stream:
            async for _ in stream:
                started.set()
                if how == "async with":
                    return
                if how == "aclose":
                    await stream.aclose()

    async def leave() -> None:
        started = asyncio.Event()
        task = asyncio.ensure_future(read(started))
        await started.wait()
        if how == "cancel":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        generated = client.status().counters.generation_tokens
        await at_rest()
        assert generated < 3000

    run_async(leave())


def test_an_answer_whose_text_is_complete_is_ended(client, run_async, make_request, at_rest):
    async def read() -> None:
        counts = [0, 0]
        async for one in await client.submit(make_request("r", n=2, temperature=1.0, max_tokens=40)):
            counts[one.index] += 1
            if (one.index, counts[0]) == (0, 4):
                await client.end_answer("r", 0)
        assert counts[0] == 4
        assert counts[1] == 40
        await at_rest()

    run_async(read())


def test_ending_the_last_answer_ends_the_stream(client, run_async, make_request, at_rest):
    async def read() -> None:
        seen = 0
        async for _ in await client.submit(make_request("r", max_tokens=3000)):
            seen += 1
            await client.end_answer("r", 0)
        assert seen == 1
        await at_rest()

    run_async(read())


def test_of_512_at_once_each_is_served_or_refused(client, run_async, collect, make_request, at_rest):
    async def one(index: int) -> int | float:
        try:
            return len((await collect(client, make_request(f"r{index}", max_tokens=2)))[0])
        except QueueFullError as error:
            return error.retry_after

    async def flood() -> None:
        results = await asyncio.gather(*(one(index) for index in range(512)))
        served = [result for result in results if isinstance(result, int)]
        refused = [result for result in results if isinstance(result, float)]
        assert set(served) == {2}
        assert len(served) >= 8 + MAX_QUEUE
        assert refused
        assert all(1 <= seconds <= 60 for seconds in refused)
        await at_rest()

    run_async(flood())


def test_what_cannot_be_served_is_refused_by_name(client, run_async, collect, make_request):
    async def wrong(request: GenerateRequest, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            await client.submit(request)

    async def try_all() -> None:
        await wrong(make_request("long", (3,) * 4096), PromptTooLongError, "4096 tokens")
        await wrong(make_request("empty", ()), UsageError, "empty prompt")
        stream = await client.submit(make_request("r", max_tokens=3000))
        await wrong(make_request("r"), UsageError, "'r' is in use")
        await stream.aclose()
        assert len((await collect(client, make_request("r")))[0]) == 8

    run_async(try_all())


@pytest.mark.parametrize("drain_timeout", [50.0, 0.0])
def test_closing_drains(kind, tiny_options, run_async, make_request, until, drain_timeout):
    if kind is of_a_process and not drain_timeout:
        pytest.skip("both share what ends requests (serve/streams.py), and a process takes seconds to start")

    async def close() -> None:
        client = kind(tiny_options(), threads=1)
        await client.start()
        stream = await client.submit(make_request("r", max_tokens=200 if drain_timeout else 4000))
        first = await stream.__anext__()
        closing = asyncio.ensure_future(client.close(drain_timeout))
        await until(lambda: not client.status().ready)
        with pytest.raises(EngineDeadError, match=r"takes no request now: (draining|closed)"):
            await client.submit(make_request("late"))
        tokens = list(first.update.new_token_ids)
        if drain_timeout:
            async for one in stream:
                tokens += one.update.new_token_ids
            assert len(tokens) == 200
        else:
            with pytest.raises(EngineDeadError, match="shuts down"):
                async for _ in stream:
                    pass
        await closing
        await client.close()
        assert client.status().state == "closed"

    run_async(close())


def test_a_model_that_cannot_be_loaded_is_told_by_its_own_error(kind, tiny_options, run_async, make_request):
    async def start() -> None:
        client = kind(replace(tiny_options(), model="/no/such/model"), threads=1)
        with pytest.raises(EngineDeadError, match="not loaded"):
            assert client.info
        with pytest.raises(ModelNotFoundError, match="/no/such/model"):
            await client.start()
        status = client.status()
        assert (status.state, status.alive, status.ready) == ("dead", False, False)
        assert "/no/such/model" in status.reason
        with pytest.raises(EngineDeadError, match="/no/such/model"):
            await client.submit(make_request("r"))
        await client.close()

    run_async(start())
