"""The processes of the ranks: started, told what to do, and watched. No torch.

The driver is none of them: it waits on pipes only, so that it sees within milliseconds that a rank has died, and ends
the others, whatever they wait for. A rank is started as a command and not through multiprocessing's spawn, which would
run the user's script again in each.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from paceline import errors
from paceline.errors import EngineError, PacelineError, UsageError
from paceline.log import get_logger

log = get_logger(__name__)

# argv: the pipe, "module:function" to call with it, the driver's sys.path.
BOOT = (
    "import sys, json, importlib; sys.path[:] = json.loads(sys.argv[3]); "
    "from multiprocessing.connection import Connection; module, _, name = sys.argv[2].partition(':'); "
    "getattr(importlib.import_module(module), name)(Connection(int(sys.argv[1])))"
)
GRACE = 1.0  # seconds in which a rank that failed first may still say so, after others met the consequence
PATIENCE = 5.0  # for a rank to end by itself
# Of the messages with which torch.distributed says that another rank is gone.
CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Gloo", "gloo", "Broken pipe")


@dataclass(frozen=True)
class Failure:
    """Why a rank cannot go on. `kind`: the error's class; `consequence`: another rank's end may be the cause."""

    kind: str
    message: str
    trace: str
    consequence: bool


def failure_of(error: BaseException) -> Failure:
    message = str(error).partition("\n")[0]
    consequence = not isinstance(error, PacelineError) and any(words in str(error) for words in CONSEQUENCES)
    return Failure(type(error).__name__, message, "".join(traceback.format_exception(error)), consequence)


class Ranks:
    """`count` processes that run `entry` ("module:function", called with a Connection). Messages are pickled; a rank
    sends Failure before it ends for a reason of its own. They end with this object, if not closed before.

    Every method raises the error of the first rank that fails, once all are ended, and so does every later call.
    """

    def __init__(self, entry: str, count: int, env: Mapping[str, str] | None = None) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection[Any, Any]] = []
        self._arrived: list[deque[Any]] = [deque() for _ in range(count)]
        self._error: PacelineError | None = None
        self._finish = weakref.finalize(self, _finish, self._processes, self._connections)
        try:
            for _ in range(count):
                self._start(entry, env or {})
        except BaseException:
            self.close()
            raise

    def _start(self, entry: str, env: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            command = [sys.executable, "-c", BOOT, str(fd), entry, json.dumps(sys.path)]
            environment = {**os.environ, **env}
            process = subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL, env=environment)
        self._processes.append(process)
        self._connections.append(Connection(ours.detach()))

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def send(self, message: Any) -> None:
        """To every rank, the same."""
        data = pickle.dumps(message, 5)
        for index in range(len(self._connections)):
            self._send(index, data)

    def send_each(self, messages: list[Any]) -> None:
        """To every rank its own."""
        for index, message in enumerate(messages):
            self._send(index, pickle.dumps(message, 5))

    def receive(self) -> Any:
        """The next message of the first rank; the others are watched meanwhile."""
        return self._next(0)

    def gather(self) -> list[Any]:
        """The next message of each rank."""
        return [self._next(index) for index in range(len(self._connections))]

    def _send(self, index: int, data: bytes) -> None:
        self._check()
        try:
            self._connections[index].send_bytes(data)
        except OSError:
            self._fail()

    def _next(self, index: int) -> Any:
        self._check()
        while not self._arrived[index]:
            for connection in wait(self._connections):
                if not self._take(self._connections.index(connection)):  # type: ignore[arg-type]
                    self._fail()
        return self._arrived[index].popleft()

    def _take(self, index: int) -> bool:
        """Receive a message; whether the rank goes on."""
        try:
            message = self._connections[index].recv()
        except (EOFError, OSError):
            return False
        self._arrived[index].append(message)
        return not isinstance(message, Failure)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self) -> None:
        """End all ranks and raise the reason of the one that failed first, as far as can be told."""
        deadline, silent = time.monotonic() + GRACE, set[int]()
        while len(silent) < len(self._connections) and time.monotonic() < deadline:
            waiting = [c for i, c in enumerate(self._connections) if i not in silent]
            for connection in wait(waiting, max(deadline - time.monotonic(), 0)):
                index = self._connections.index(connection)  # type: ignore[arg-type]
                if not self._take(index):
                    silent.add(index)
        for index in silent:
            with suppress(subprocess.TimeoutExpired):
                self._processes[index].wait(GRACE)
        reasons = [(*self._reason(index), index) for index in silent]
        _, error, _ = min(reasons, key=lambda reason: (reason[0], reason[2]), default=(3, _stuck(), 0))
        self._error = error
        _kill(self._processes)
        raise error

    def _reason(self, index: int) -> tuple[int, PacelineError]:
        """Why a rank has ended, and how far from the cause that may be."""
        process, who = self._processes[index], f"rank {index} of {len(self._processes)}"
        failure = next((one for one in self._arrived[index] if isinstance(one, Failure)), None)
        if failure is None:
            return 0, EngineError(f"{who} (pid {process.pid}) {_ending(process.poll())}: load the model again")
        log.debug("%s:\n%s", who, failure.trace)
        known = getattr(errors, failure.kind, None)
        if isinstance(known, type) and issubclass(known, PacelineError):
            message = failure.message if issubclass(known, UsageError) else f"{who}: {failure.message}"
            return 1, known(message)
        text = f"{who} (pid {process.pid}) failed: {failure.kind}: {failure.message}: load the model again"
        return (2 if failure.consequence else 1), EngineError(text)

    def close(self) -> None:
        """End the ranks. Later calls raise UsageError."""
        if self._error is None:
            self._error = UsageError("the ranks were ended: load the model again")
        self._finish()


def _finish(processes: Sequence[subprocess.Popen[bytes]], connections: Sequence[Connection[Any, Any]]) -> None:
    for connection in connections:
        connection.close()  # which a rank understands
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0))
    _kill(processes)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its pipe"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _stuck() -> PacelineError:
    return EngineError("a rank's pipe is broken: load the model again")
