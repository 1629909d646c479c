"""The engine's life in a server: it takes requests once the weights are there, and goes on starting behind them."""

from __future__ import annotations

import threading
from typing import Any

from paceline.engine import warm_up
from paceline.serve.in_process import InProcessClient


def test_requests_are_answered_while_the_model_compiles(
    tiny_options, run_async, collect, make_request, until, monkeypatch
):
    released = threading.Event()

    def compile_model(*model: Any) -> str:
        assert released.wait(20)
        return "no compiler"

    monkeypatch.setattr(warm_up, "compile_model", compile_model)

    async def serve() -> None:
        client = InProcessClient(tiny_options(mode="compile"))
        try:
            await client.start()
            assert client.status().ready
            assert len((await collect(client, make_request("r")))[0]) == 8
            startup = client.status().startup
            assert startup.phase == "compile"
            assert "weights" in startup.phases
            assert "compile" not in startup.phases
            released.set()
            await until(lambda: "compile" in client.status().startup.phases)
            assert client.status().startup.phase is None
        finally:
            released.set()
            await client.close()

    run_async(serve())
