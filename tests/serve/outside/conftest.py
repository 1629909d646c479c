"""`paceline serve` as a user starts it: processes, a port, and nothing that a client could not see or a shell do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

START_SECONDS = 180  # a machine with two cores that others use imports torch for long


class Reading:
    """A streamed completion, read in a thread: its text, the last event before [DONE], the longest wait for one."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.begun = threading.Event()
        self.text = ""
        self.last: dict[str, Any] = {}
        self.longest_wait = 0.0
        self._client = httpx.Client(base_url=url, timeout=60)
        self._body = {**body, "stream": True}

    def read(self) -> Reading:
        with self._client, self._client.stream("POST", "/v1/completions", json=self._body) as response:
            assert response.status_code == 200
            lines, heard = [""], time.monotonic()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    now = time.monotonic()
                    self.longest_wait, heard = max(self.longest_wait, now - heard), now
                    self.last = json.loads(line[6:])
                    self.text += "".join(choice["text"] for choice in self.last.get("choices", []))
                    self.begun.set()
                lines.append(line or lines[-1])
        assert lines[-1] == "data: [DONE]"
        return self


class ServerProcess:
    """A server and its engine, each in a process of its own. `client`: httpx at its root."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "paceline", "serve", *arguments, "--port", "0"]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
        self.url = self._url()
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _url(self) -> str:
        """From the line that it begins with, as port 0 is any."""
        found: list[str] = []

        def is_told() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            found.extend(re.findall(r" on (http://\S+)/v1", self.log.read_text()))
            return bool(found)

        self.wait_for(is_told, START_SECONDS)
        return found[0]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20) -> float:
        """Ask until it holds; the seconds that took."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < seconds, f"it did not come to hold in {seconds} s"
            time.sleep(0.01)
        return time.monotonic() - start

    @property
    def is_live(self) -> bool:
        return self.client.get("/health/live").status_code == 200

    @property
    def is_ready(self) -> bool:
        return self.client.get("/health/ready").status_code == 200

    @property
    def engine_pid(self) -> int | None:
        """The child that runs the engine; None while there is none. multiprocessing's own child is left out."""
        return next(iter(self._children(self.process.pid, b"spawn_main")), None)

    @property
    def rank_pids(self) -> list[int]:
        """The engine's children that hold a part of the model each."""
        engine = self.engine_pid
        return [] if engine is None else self._children(engine, b"paceline.engine.rank")

    def _children(self, pid: int, command: bytes) -> list[int]:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [int(child) for child in children if command in Path(f"/proc/{child}/cmdline").read_bytes()]
        except (FileNotFoundError, ProcessLookupError):
            return []  # one has ended just now

    def gauge(self, name: str) -> float:
        """A value of /metrics, all labels together."""
        lines = self.client.get("/metrics").text.splitlines()
        values = [line.rpartition(" ")[2] for line in lines if re.match(rf"{name}[ {{]", line)]
        assert values, name
        return sum(map(float, values))

    def wait_until_idle(self) -> None:
        """Nothing runs or waits, and no request holds a block of the cache."""
        names = ("paceline_requests_running", "paceline_requests_waiting", "paceline_kv_cache_usage_ratio")
        self.wait_for(lambda: all(self.gauge(name) == 0 for name in names))

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json=self._completion(prompt, fields))

    def reading(self, prompt: Any = "hello", **fields: Any) -> Reading:
        """The same, to be streamed."""
        return Reading(self.url, self._completion(prompt, fields))

    def _completion(self, prompt: Any, fields: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}

    def close(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`with serve("MODEL", "--flag", ...) as server`: a server that is ready."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("needs /proc, to find the engine's process")

    @contextmanager
    def serve(*arguments: str) -> Iterator[ServerProcess]:
        server = ServerProcess(tmp_path_factory.mktemp("server") / "log", *arguments)
        try:
            server.wait_for(lambda: server.process.poll() is not None or server.is_ready, START_SECONDS)
            yield server
        finally:
            server.close()

    return serve


# 16 sequences and a queue of 64: 512 requests at once fill it, 64 do not.
TINY = ("--dtype", "float32", "--device", "cpu", "--threads", "1", "--max-num-seqs", "16", "--max-queue", "64")


@pytest.fixture(scope="session")
def tiny_arguments(tiny_chat_model: Path) -> tuple[str, ...]:
    """What the shared server is started with: a byte-level model of two layers, called "tiny"."""
    return (str(tiny_chat_model), "--served-model-name", "tiny", *TINY)


@pytest.fixture(scope="session")
def shared_server(serve: Callable[..., Any], tiny_arguments: tuple[str, ...]) -> Iterator[ServerProcess]:
    with serve(*tiny_arguments) as server:
        yield server


@pytest.fixture
def server(shared_server: ServerProcess) -> Iterator[ServerProcess]:
    """The shared one. Whatever a test has done, its engine's process is the same afterwards and it answers."""
    engine = shared_server.engine_pid
    yield shared_server
    check_unharmed(shared_server, engine)


def check_unharmed(server: ServerProcess, engine_pid: int | None) -> None:
    answer = server.chat("hello")
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    assert server.engine_pid == engine_pid is not None
