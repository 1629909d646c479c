"""A tiny chat model behind a real server on a free port of this machine, and clients for it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from paceline.engine.load_options import LoadOptions
from paceline.serve.in_process import InProcessClient
from paceline.serve.server import ListenOptions, listen, make_server
from paceline.serve.service import Service
from paceline.serve.settings import ServerSettings
from paceline.serve.text import TextOptions


class Running:
    """A server in a thread. `client`: httpx at its root."""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}
        return self.post("/v1/chat/completions", body)

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0, **fields})

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a streamed answer, parsed; [DONE] as it is."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.text.endswith("\n\n")
        lines = response.text.removesuffix("\n\n").split("\n\n")
        assert all(line.startswith("data: ") for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        """Ask until it holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to hold"
            time.sleep(0.005)


@pytest.fixture(scope="session")
def serving(tiny_chat_model: Path) -> Callable[..., Any]:
    """`with serving(api_keys=("k",)) as server`: a server with these settings, ready unless `wait=False`."""

    @contextmanager
    def serve(
        *,
        model: Path = tiny_chat_model,
        wait: bool = True,
        engine: dict[str, Any] | None = None,
        client: Any = None,
        drain: float = 5,
        **settings: Any,
    ) -> Iterator[Running]:
        options = LoadOptions(str(model), device="cpu", dtype="float32", **(engine or {}))
        made = client or InProcessClient(options)
        where = ListenOptions(port=0, drain_timeout=drain)
        names = settings.pop("served_model_names", ("tiny", "tiny-alias"))
        service = Service(made, ServerSettings(names, **settings), TextOptions(str(model)).load)
        listener = listen(where)
        server = make_server(service, where)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running = Running(service, listener.getsockname()[1])
        running.server = server  # type: ignore[attr-defined]
        try:
            if wait:
                running.wait_for(lambda: running.client.get("/health").status_code == 200, 30)
            yield running
        finally:
            server.should_exit = True
            running.client.close()
            thread.join(20)
            assert not thread.is_alive(), "the server did not end"

    return serve


@pytest.fixture(scope="session")
def server(serving: Callable[..., Any]) -> Iterator[Running]:
    """One that most tests share; each leaves it as it was."""
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the shared server works on nothing and holds no block of its cache for a request."""
    yield
    if "server" in request.fixturenames:
        running: Running = request.getfixturevalue("server")

        def idle() -> bool:
            status = running.service.client.status()
            return status.running == status.waiting == 0 and running.service.num_in_flight == 0

        running.wait_for(idle)


@pytest.fixture(scope="session")
def run_briefly() -> Callable[[Any], Any]:
    return lambda coroutine: asyncio.run(asyncio.wait_for(coroutine, 30))
