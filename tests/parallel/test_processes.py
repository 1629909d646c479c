"""Processes that are started, told and watched: whatever ends one of them, the driver says so at once."""

from __future__ import annotations

import gc
import os
import signal
import time

import pytest

from paceline.errors import EngineError, UsageError
from paceline.parallel import processes
from paceline.parallel.processes import Ranks

# What a rank runs: it does what it is told. No torch, so that it starts in 0.2 s.
MEMBER = """
import os, signal, sys, time
from paceline.errors import UsageError
from paceline.parallel.processes import failure_of

def main(connection):
    index = connection.recv()
    connection.send(("here", index, os.getpid()))
    try:
        while True:
            told = connection.recv()
            do = told.get(index) if isinstance(told, dict) else told
            if do == "usage":
                raise UsageError("this cannot be right")
            if do == "bug":
                raise ValueError("a bug")
            if do == "consequence":
                raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]")
            if do == "exit":
                os._exit(3)
            if do == "kill":
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGKILL)
            if do == "hang":
                time.sleep(100)
            connection.send((do, index))
    except EOFError:
        pass
    except Exception as error:
        connection.send(failure_of(error))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Ranks that run MEMBER, ended after the test."""
    (tmp_path / "member_of_test.py").write_text(MEMBER)
    monkeypatch.syspath_prepend(str(tmp_path))
    started: list[Ranks] = []

    def make(count):
        ranks = Ranks("member_of_test:main", count)
        started.append(ranks)
        ranks.send_each(list(range(count)))
        assert [message[:2] for message in ranks.gather()] == [("here", i) for i in range(count)]
        return ranks

    yield make
    for ranks in started:
        ranks.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_messages_go_to_all_and_come_in_order(start):
    ranks = start(3)
    ranks.send("a")
    ranks.send("b")
    assert [ranks.receive(), ranks.receive()] == [("a", 0), ("b", 0)]
    ranks.send("c")
    assert ranks.gather() == [("c", 0), ("a", 1), ("a", 2)]
    ranks.close()
    assert all(map(gone, ranks.pids))


@pytest.mark.parametrize(
    ("told", "error", "words"),
    [
        ({1: "usage"}, UsageError, ["this cannot be right"]),
        ({1: "bug"}, EngineError, ["rank 1 of 2", "ValueError: a bug", "load the model again"]),
        ({1: "exit"}, EngineError, ["rank 1 of 2", "exit code 3"]),
        ({1: "kill", 0: "hang"}, EngineError, ["rank 1 of 2", "SIGKILL"]),
        # The cause comes after its consequence, and is what is told.
        ({0: "consequence", 1: "kill"}, EngineError, ["rank 1 of 2", "SIGKILL"]),
        ({0: "consequence", 1: "bug"}, EngineError, ["rank 1 of 2", "a bug"]),
    ],
)
def test_the_reason_of_the_first_to_fail_is_told_within_seconds(start, told, error, words):
    ranks = start(2)
    ranks.send(told)
    began = time.monotonic()
    with pytest.raises(error) as raised:
        ranks.gather()
    assert time.monotonic() - began < 4
    assert type(raised.value) is error
    for word in words:
        assert word in str(raised.value)
    assert all(map(gone, ranks.pids))
    with pytest.raises(error) as again:
        ranks.send("more")
    assert again.value is raised.value


def test_a_rank_that_dies_between_messages_is_told_at_the_next(start):
    ranks = start(2)
    os.kill(ranks.pids[1], signal.SIGKILL)
    with pytest.raises(EngineError, match=r"rank 1 of 2 .* was killed by SIGKILL"):
        ranks.gather()


def test_ranks_that_are_forgotten_end(tmp_path, monkeypatch):
    (tmp_path / "forgotten_of_test.py").write_text(MEMBER)
    monkeypatch.syspath_prepend(str(tmp_path))
    ranks = Ranks("forgotten_of_test:main", 2)
    pids = ranks.pids
    ranks.send_each([0, 1])
    del ranks
    gc.collect()
    assert all(map(gone, pids))


def test_close_ends_a_rank_that_hangs(start, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    ranks = start(2)
    ranks.send({0: "hang", 1: "hang"})
    began = time.monotonic()
    ranks.close()
    assert time.monotonic() - began < 3
    assert all(map(gone, ranks.pids))
    with pytest.raises(UsageError, match="ended"):
        ranks.send("more")
