"""An engine that dies, stops or cannot come back, and what its clients see of it. Real processes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import EngineDeadError
from paceline.serve import supervisor
from paceline.serve.health import Deadlines
from paceline.serve.messages import Failure, LoadFailed, encode
from paceline.serve.zmq_client import ZmqClient, supervised

Run = Callable[[Any], Any]


@pytest.fixture(scope="module")
def client(tiny_options: Any, run_async: Run) -> Iterator[ZmqClient]:
    """One for most tests, as a process takes seconds to start: it may die often, and is replaced at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "MAX_DEATHS", 100)
        patch.setattr(supervisor, "LONGEST_BACKOFF", 0.0)
        made = ZmqClient(supervised(tiny_options(), threads=1), deadlines=Deadlines(resume=50.0))
        run_async(made.start())
        yield made
        run_async(made.close())


def send(client: ZmqClient, signal_number: int) -> None:
    assert client.engine_pid is not None
    os.kill(client.engine_pid, signal_number)


class Killer:
    """Kills the engine once, when every one of `requests` has got `after` updates."""

    def __init__(self, client: ZmqClient, requests: int, after: int = 5) -> None:
        self._client, self._missing, self._after = client, requests, after
        self._counts: dict[str, int] = {}

    def __call__(self, one: Any) -> None:
        name = one.update.request_id
        self._counts[name] = self._counts.get(name, 0) + 1
        if self._counts[name] == self._after:
            self._missing -= 1
            if self._missing == 0:
                send(self._client, signal.SIGKILL)


async def read(stream: Any, seen: Killer) -> list[int]:
    tokens: list[int] = []
    async for one in stream:
        tokens += one.update.new_token_ids
        seen(one)
    return tokens


def test_kill_9_in_the_middle_changes_no_token(client, run_async, collect, make_request, until):
    """Greedy, sampled with all that reads a history, several answers, without a seed, and beams, which begin anew."""
    long = {"max_tokens": 120}
    requests = [
        make_request("greedy", **long),
        make_request("sampled", temperature=1.0, seed=5, presence_penalty=1.0, repetition_penalty=1.3, **long),
        make_request("three", n=3, temperature=1.0, seed=6, **long),
        make_request("lengths", temperature=1.0, seed=7, min_tokens=90, stop_token_ids=tuple(range(3, 40)), **long),
        make_request("beams", n=2, use_beam_search=True, **long),
    ]

    async def kill() -> None:
        alone = [await collect(client, request) for request in requests]
        old, before, restarts = client.engine_pid, client.status().counters, client.status().restarts
        killer = Killer(client, requests=len(requests))
        drawing = await client.submit(make_request("drawn", temperature=1.0, **long))
        *together, drawn = await asyncio.gather(
            *(collect(client, request, killer) for request in requests), read(drawing, killer)
        )
        assert together == alone
        # Its seed was the engine's: drawn again, the rest would be another's.
        assert drawn == (await collect(client, make_request("again", temperature=1.0, seed=drawing.seed, **long)))[0]
        assert client.engine_pid != old
        status = client.status()
        assert (status.state, status.restarts) == ("ready", restarts + 1)
        assert status.counters.requests >= before.requests
        assert await collect(client, make_request("after")) == {0: alone[0][0][:8]}
        await until(lambda: client.status().kv_usage == client.status().running == 0)

    run_async(kill())


def test_readiness_follows_a_death_and_requests_fail_without_an_engine_in_time(
    client, run_async, collect, make_request, until, monkeypatch
):
    monkeypatch.setattr(client, "_deadlines", Deadlines(resume=0.05))

    async def kill() -> None:
        stream = await client.submit(make_request("r", max_tokens=3000))
        await stream.__anext__()
        send(client, signal.SIGKILL)
        killed = time.monotonic()
        await until(lambda: not client.status().ready)
        status = client.status()
        assert (status.state, status.alive, status.reason) == ("restarting", True, "the engine ended by signal 9")
        with pytest.raises(EngineDeadError, match="takes no request now: the engine ended by signal 9"):
            await client.submit(make_request("late"))
        with pytest.raises(EngineDeadError, match="signal 9, and no other was ready in time"):
            async for _ in stream:
                pass
        assert time.monotonic() - killed < 5
        await until(lambda: client.status().ready)
        assert len((await collect(client, make_request("r")))[0]) == 8

    run_async(kill())


def test_a_request_outlives_one_engine_and_no_second(client, run_async, collect, make_request, until):
    """It may be the request that kills: it is not given a third engine."""

    async def kill() -> None:
        stream = await client.submit(make_request("r", max_tokens=4000))
        restarts = client.status().restarts

        async def kill_twice() -> None:
            count = 0
            async for _ in stream:
                count += 1
                if count in (3, 303):
                    send(client, signal.SIGKILL)

        with pytest.raises(EngineDeadError, match="died 2 times while request 'r' ran"):
            await kill_twice()
        await until(lambda: client.status().ready)
        assert client.status().restarts == restarts + 2
        assert len((await collect(client, make_request("r")))[0]) == 8

    run_async(kill())


@pytest.mark.parametrize("busy", [False, True])
def test_a_stopped_engine_is_alive_and_not_ready(client, run_async, collect, make_request, until, monkeypatch, busy):
    async def stop() -> None:
        old = client.engine_pid
        stream = await client.submit(make_request("busy", max_tokens=500 if busy else 1))
        await stream.__anext__()
        monkeypatch.setattr(client, "_deadlines", Deadlines(beat=1.0))
        send(client, signal.SIGSTOP)
        stopped = time.monotonic()
        await until(lambda: not client.status().ready)
        assert time.monotonic() - stopped < 4
        status = client.status()
        assert (status.state, status.alive) == ("stalled", True)
        assert "nothing was heard of the engine" in status.reason
        with pytest.raises(EngineDeadError, match="nothing was heard"):
            await client.submit(make_request("r"))
        monkeypatch.undo()
        send(client, signal.SIGCONT)
        await until(lambda: client.status().ready)
        rest = [one async for one in stream]
        assert len(rest) == (499 if busy else 0)
        assert len((await collect(client, make_request("r")))[0]) == 8
        assert client.engine_pid == old

    run_async(stop())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_do_not_end_the_engine(client, run_async, collect, make_request, number):
    """They reach the API too, which drains first."""

    async def interrupt() -> None:
        old, before = client.engine_pid, await collect(client, make_request("a"))
        send(client, number)
        assert await collect(client, make_request("b")) == before
        assert client.engine_pid == old

    run_async(interrupt())


def test_an_engine_that_keeps_dying_is_given_up(tiny_options, run_async, make_request, monkeypatch):
    monkeypatch.setattr(supervisor, "MAX_DEATHS", 1)

    async def kill() -> None:
        client = ZmqClient(supervised(tiny_options(), threads=1))
        await client.start()
        stream = await client.submit(make_request("r", max_tokens=3000))
        await stream.__anext__()
        send(client, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="died 1 times within"):
            async for _ in stream:
                pass
        status = client.status()
        assert (status.state, status.alive, status.ready) == ("dead", False, False)
        await client.close()

    run_async(kill())


def test_a_start_can_be_cancelled(tiny_options, run_async):
    async def cancel() -> None:
        client = ZmqClient(supervised(tiny_options()))
        task = asyncio.ensure_future(client.start())
        while client.engine_pid is None:
            await asyncio.sleep(0)
        assert (client.status().state, client.status().ready) == ("starting", False)
        task.cancel()
        await client.close()
        assert client.engine_pid is None
        with pytest.raises(asyncio.CancelledError):
            await task

    run_async(cancel())


def test_an_idle_engine_uses_no_cpu(client, run_async, collect, make_request, until):
    def cpu_seconds(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def idle() -> None:
        await collect(client, make_request("r"))
        await until(lambda: client.status().running == 0)
        before, start = cpu_seconds(client.engine_pid), time.monotonic()
        await until(lambda: time.monotonic() - start > 2)  # what is measured is the time itself
        assert cpu_seconds(client.engine_pid) - before <= 0.05

    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    run_async(idle())


def test_the_engine_ends_with_its_parent(tiny_weights, tmp_path):
    """Even if that is killed: the engine holds the other end of its standard output until it is gone."""
    script = tmp_path / "serve.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import asyncio
            from paceline.engine.load_options import LoadOptions
            from paceline.serve.zmq_client import ZmqClient, supervised

            async def main():
                options = LoadOptions({str(tiny_weights)!r}, device="cpu", skip_tokenizer_init=True)
                client = ZmqClient(supervised(options, threads=1))
                await client.start()
                print("ready", flush=True)
                await asyncio.Event().wait()

            if __name__ == "__main__":
                asyncio.run(main())
            """
        )
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        rest, _ = parent.communicate(timeout=20)
    assert rest == ""


def test_a_next_engine_that_cannot_load_says_why(client, caplog):
    """The first one's failure ends the start and is told there."""
    client._receive(encode(LoadFailed(Failure("OutOfMemoryError", "no room for the weights"))))
    assert "the next engine could not load the model: no room for the weights" in caplog.text
    assert client.status().ready
