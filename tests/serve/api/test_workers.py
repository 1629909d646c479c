"""`paceline serve --api-workers 2`, as a process: one port, one set of counts, and what happens when a part dies."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.cli.app import main

if not Path("/proc/self/fd").exists():
    pytest.skip("needs /proc", allow_module_level=True)


class Served:
    """Each request has a connection of its own: the kernel chooses the worker."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json", "Connection": "close"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def complete(self, **fields: Any) -> int:
        return self.ask("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 3, **fields})[0]

    def stream(self, **fields: Any) -> http.client.HTTPConnection:
        """One whose first event has come, with hundreds to follow."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = {"prompt": "hi", "max_tokens": 450, "ignore_eos": True, "stream": True, **fields}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        self.response = connection.getresponse()
        assert self.response.readline().startswith(b"data: ")
        return connection

    def metric(self, name: str) -> float:
        text = self.ask("GET", "/metrics")[1].decode()
        found = re.findall(rf"^paceline_{name}\S* (\S+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    def ready(self) -> bool:
        return self.ask("GET", "/health")[0] == 200

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        command = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in text.split()}
        return [pid for pid, words in command.items() if "spawn_main" in words]

    def engine(self) -> int:
        (pid,) = [pid for pid in self.children() if "libtorch" in Path(f"/proc/{pid}/maps").read_text()]
        return pid

    def worker_of(self, connection: http.client.HTTPConnection) -> int:
        """The process at the other end."""
        port = f":{connection.sock.getsockname()[1]:04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        (inode,) = [fields[9] for fields in lines if fields[2].endswith(port) and fields[9] != "0"]
        for pid in self.children():
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if os.readlink(link) == f"socket:[{inode}]":
                    return pid
        raise AssertionError("nobody has the connection")


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def served(tiny_chat_model: Path) -> Iterator[Served]:
    command = [sys.executable, "-m", "paceline", "serve", str(tiny_chat_model), "--port", "0", "--api-workers", "2"]
    options = ["--threads", "1", "--max-num-seqs", "8", "--served-model-name", "tiny"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    port = int(re.search(r"127\.0\.0\.1:(\d+)/v1", process.stderr.readline()).group(1))
    made = Served(process, port)
    try:
        # Workers answer before the engine has loaded; each loads a tokenizer of its own after it.
        for _ in range(8):
            until(made.ready, 60)
        yield made
    finally:
        process.kill()
        process.communicate()


def test_every_worker_tells_the_counts_of_all(served):
    assert [served.complete() for _ in range(12)] == [200] * 12
    served.ask("POST", "/v1/completions", {"prompt": 1})
    until(lambda: served.metric("requests_accepted_total") == 12)  # the engine's own, several times a second
    assert {served.metric("time_to_first_token_seconds_count") for _ in range(8)} == {12}
    assert {
        served.metric(r'http_requests_total{handler="/v1/completions",method="POST",status="400"}') for _ in range(8)
    } == {1}
    assert {served.metric("requests_finished_total") for _ in range(8)} == {12}


def test_a_worker_that_is_killed_is_replaced_and_the_engine_drops_its_requests(served):
    before = served.metric("generation_tokens_total")
    connection = served.stream(n=8)
    worker = served.worker_of(connection)
    others = set(served.children()) - {worker}
    os.kill(worker, signal.SIGKILL)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        served.response.read()
    connection.close()
    counts = [before, -1.0]
    while counts[-1] != counts[-2]:  # the engine tells four times a second
        time.sleep(0.6)
        counts.append(served.metric("generation_tokens_total"))
    assert before < counts[-1] < before + 8 * 440
    # What falls to the missing one waits for the next, which says 503 while it reads the tokenizer.
    statuses = [served.complete() for _ in range(8)]
    assert set(statuses) <= {200, 503}
    for _ in range(8):
        until(served.ready)
    assert len(served.children()) == 3
    assert others < set(served.children())
    assert {served.metric("requests_finished_total") for _ in range(4)} == {12 + statuses.count(200)}


def test_an_engine_that_is_killed_is_replaced_for_all_workers(served):
    accepted = served.metric("requests_accepted_total")
    engine = served.engine()
    os.kill(engine, signal.SIGKILL)
    until(lambda: not served.ready() or served.metric("engine_restarts_total") == 1)
    for _ in range(8):
        until(served.ready)
    assert served.engine() != engine
    assert [served.complete() for _ in range(8)] == [200] * 8
    assert {served.metric("engine_restarts_total") for _ in range(8)} == {1}
    until(lambda: {served.metric("requests_accepted_total") for _ in range(8)} == {accepted + 8})


def test_sigterm_lets_answers_finish(served):
    """Sent to the whole group, as a terminal sends Ctrl-C and systemd its SIGTERM."""
    connection = served.stream()
    pids, engine = served.children(), served.engine()
    os.killpg(served.process.pid, signal.SIGTERM)
    assert served.response.read().endswith(b"data: [DONE]\n\n")
    assert Path(f"/proc/{engine}").exists()  # the worker that had nothing to do did not take it along
    connection.close()
    assert served.process.wait(30) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_port_in_use(capsys):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "/no/such/model", "--api-workers", "2", "--port", str(port)]) == 1
    assert f"port {port} is in use" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "says"),
    [("config.json", "config.json"), ("tokenizer.json", "tokenizer")],
    ids=["the engine's model", "the workers' tokenizer"],
)
def test_a_start_that_fails_ends_all_with_one_line(tiny_chat_model, tmp_path, broken, says):
    shutil.copytree(tiny_chat_model, tmp_path / "model")
    (tmp_path / "model" / broken).unlink()
    process = subprocess.run(
        [sys.executable, "-m", "paceline", "serve", str(tmp_path / "model"), "--port", "0", "--api-workers", "2"],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert process.returncode == 1
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert process.stderr.splitlines()[-1] == errors[0]
    assert says in errors[0]
    assert "Traceback" not in process.stderr
