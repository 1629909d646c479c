"""An encoder in a process of its own: it is killed, drained and closed as an engine that generates is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline.encoders.inputs import Tokens
from paceline.engine.load_options import LoadOptions
from paceline.errors import EngineDeadError
from paceline.serve.client import EncodeRequest
from paceline.serve.health import Deadlines
from paceline.serve.zmq_client import ZmqClient, supervised

Run = Callable[[Any], Any]
FOX = Tokens((1, 30, 2))
MANY = tuple(Tokens((1, *([4 + i % 26] * (1 + i % 20)), 2)) for i in range(4000))


@pytest.fixture
def client(tiny_encoder: Path, run_async: Run) -> Iterator[ZmqClient]:
    options = LoadOptions(str(tiny_encoder), device="cpu", dtype="float32", mode="eager")
    made = ZmqClient(supervised(options, threads=1), deadlines=Deadlines(resume=50.0))
    run_async(made.start())
    yield made
    run_async(made.close())


async def values(client: ZmqClient, name: str, *texts: Tokens) -> Any:
    encoding = await client.encode(EncodeRequest(name, texts))
    return np.frombuffer(encoding.rows, np.float32).reshape(len(texts), -1)


def test_requests_outlive_an_engine_and_a_drain_waits_for_them(
    client: ZmqClient, run_async: Run, until: Callable[..., Any]
) -> None:
    async def live() -> None:
        alone = await values(client, "alone", FOX)
        pid = client.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # so that the request is not answered before the engine dies
        whole = asyncio.ensure_future(values(client, "whole", *MANY))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: client.status().state == "restarting")
        with pytest.raises(EngineDeadError):
            await values(client, "too-early", FOX)
        rows = await whole
        assert client.status().restarts == 1
        again = await values(client, "again", *MANY)
        assert np.abs(rows - again).max() < 1e-5
        assert np.abs(alone - await values(client, "alone", FOX)).max() < 1e-6

        pid = client.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        cancelled = asyncio.ensure_future(values(client, "cancelled", *MANY))
        last = asyncio.ensure_future(values(client, "last", *MANY))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        closing = asyncio.ensure_future(client.close(drain_timeout=30))
        await asyncio.sleep(0.1)
        assert not last.done()
        os.kill(pid, signal.SIGCONT)
        await closing
        assert np.abs(await last - again).max() < 1e-5

    run_async(live())
