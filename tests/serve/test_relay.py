"""A worker's end of the pipe: what its client hears of an engine that another process owns."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from typing import Any

import pytest

from paceline.errors import EngineDeadError, UsageError
from paceline.serve.client import EngineCounters
from paceline.serve.engine_process import Addresses
from paceline.serve.failures import error_of
from paceline.serve.messages import Failure, LoadFailed, encode
from paceline.serve.relay import Died, Exit, GivenUp, Launched, RelayedEngine
from paceline.serve.server import ListenOptions
from paceline.serve.settings import ServerSettings
from paceline.serve.text import TextOptions
from paceline.serve.worker_server import WorkerOptions, serve_as_worker
from paceline.serve.zmq_client import ZmqClient


@pytest.fixture
def attached(tmp_path):
    """A client, the owner's end of its pipe, and how often it was told to exit; in the event loop that runs."""

    def make() -> tuple[ZmqClient, Any, list[str]]:
        mine, theirs = multiprocessing.Pipe()
        exits: list[str] = []
        client = ZmqClient(lambda watcher: RelayedEngine(theirs, watcher, lambda: exits.append("exit")), name=b"worker")
        return client, mine, exits

    return make


def addresses(path) -> Addresses:
    return Addresses(f"ipc://{path}/requests", f"ipc://{path}/beats")


def test_an_engine_that_dies_while_it_loads_is_waited_for(attached, run_async, tmp_path, until):
    """The owner decides whether there is another; its own client has the first one's error."""

    async def play() -> None:
        client, owner, exits = attached()
        starting = asyncio.ensure_future(client.start())
        await asyncio.sleep(0)
        owner.send(Launched(addresses(tmp_path), 1, EngineCounters()))
        owner.send(Died("ended with exit code 1"))
        owner.send(Launched(addresses(tmp_path), 2, EngineCounters(requests=7)))
        await until(lambda: client.status().restarts == 1)
        client._receive(encode(LoadFailed(Failure("OutOfMemoryError", "too large"))))
        await asyncio.sleep(0.02)
        assert not starting.done()
        status = client.status()
        assert (status.alive, status.ready, status.counters.requests) == (True, False, 7)
        owner.send(Exit())
        await until(lambda: exits == ["exit"])
        starting.cancel()
        await client.close()
        assert client.status().state == "closed"

    run_async(play())


def test_a_worker_that_cannot_begin_tells_its_owner(tmp_path):
    """Or it would be replaced by one that cannot begin either."""
    mine, theirs = multiprocessing.Pipe()
    settings = ServerSettings(("tiny",), otlp_traces_endpoint="grpc://localhost")
    options = WorkerOptions(settings, TextOptions(str(tmp_path)), ListenOptions())
    with socket.socket() as listener:
        assert serve_as_worker(options, b"worker", listener, theirs)
    error = error_of(mine.recv().failure)
    assert isinstance(error, UsageError)
    assert "OTLP over HTTP" in str(error)


def test_an_engine_that_is_given_up(attached, run_async, tmp_path, until, make_request):
    async def play() -> None:
        client, owner, _ = attached()
        starting = asyncio.ensure_future(client.start())
        await asyncio.sleep(0)
        owner.send(GivenUp("the engine died 5 times"))
        await until(lambda: not client.status().alive)
        with pytest.raises(EngineDeadError, match="died 5 times"):
            await client.submit(make_request("r"))
        starting.cancel()
        await client.close()

    run_async(play())
