"""Several API processes on one port before one engine. This process serves nothing: it owns the engine, starts the
workers, and starts another in the place of one that dies.

Each worker has a socket of its own on the port, and the kernel deals connections out. This process keeps them all open:
what comes while a worker is missing is not refused but waits in its queue for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import pickle
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from paceline.engine.load_options import LoadOptions
from paceline.errors import EngineDeadError
from paceline.log import get_logger
from paceline.serve.admission import QueueLimits
from paceline.serve.client import ModelInfo
from paceline.serve.engine_process import Addresses, EngineSpec
from paceline.serve.failures import error_of
from paceline.serve.relay import Died, Exit, Failed, GivenUp, Launched
from paceline.serve.supervisor import DEATH_WINDOW, MAX_DEATHS, Supervisor
from paceline.serve.tasks import cancel
from paceline.serve.worker import WorkerSpec, run_worker
from paceline.serve.worker_server import WorkerOptions
from paceline.serve.zmq_client import ZmqClient

log = get_logger(__name__)

RESTART_SECONDS = 0.5  # before a worker is replaced: one that dies at once must not take a core
LAST_SECONDS = 10.0  # that workers have beyond the drain's, to end by themselves


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    name: bytes


class Workers:
    """A worker for each listener, and the engine. `run` once; belongs to one event loop."""

    def __init__(
        self,
        load: LoadOptions,
        options: WorkerOptions,
        listeners: Sequence[socket.socket],
        *,
        limits: QueueLimits | None = None,
        threads: int | None = None,
        log_level: int = logging.WARNING,
    ) -> None:
        """`limits`, `threads` and `log_level`: the engine's."""
        engine = EngineSpec(pickle.dumps(load), limits or QueueLimits(), threads, log_level)
        self._listeners = listeners
        self._directory = tempfile.mkdtemp(prefix="paceline-metrics-")
        levels = {name: logging.getLogger(name).level for name in ("paceline", "paceline.serve")}
        self._spec = WorkerSpec(pickle.dumps(options), levels, self._directory)
        self._drain_timeout = options.where.drain_timeout
        self._client = ZmqClient(lambda client: Supervisor(engine, _Both(client, self)), deadlines=options.deadlines)
        self._workers: dict[int, _Worker] = {}
        self._num_started = 0
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._engine: Launched | None = None  # the one that runs
        self._ending = False
        self._failure: Exception | None = None

    async def run(self, on_ready: Callable[[ModelInfo], None] = lambda info: None) -> None:
        """Serve until SIGTERM or Ctrl-C, and drain. Raises what the start failed with, EngineDeadError where the engine
        or worker after worker has died for good."""
        loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        for one in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(one, self._exit)
        for index in range(len(self._listeners)):
            self._start_worker(index)
        loading = asyncio.ensure_future(self._start_engine(on_ready))
        try:
            await self._over.wait()
        finally:
            await cancel(loading)
            await self._client.close()
            shutil.rmtree(self._directory, ignore_errors=True)
        if self._failure is not None:
            raise self._failure

    async def _start_engine(self, on_ready: Callable[[ModelInfo], None]) -> None:
        try:
            await self._client.start()
        except Exception as error:
            self._fail(error)
        else:
            on_ready(self._client.info)

    # ------------------------------------------------------------------------------------------------- workers

    def _start_worker(self, index: int) -> None:
        if self._ending:
            return
        mine, theirs = multiprocessing.Pipe()
        self._num_started += 1
        name = f"worker-{self._num_started}".encode()
        # spawn: see Supervisor.launch.
        process = multiprocessing.get_context("spawn").Process(
            target=run_worker, args=(self._spec, name, self._listeners[index], theirs), name=f"paceline-api-{index}"
        )
        process.start()
        theirs.close()
        self._workers[index] = _Worker(process, mine, name)
        loop = asyncio.get_running_loop()
        loop.add_reader(process.sentinel, self._ended, index)
        if self._engine is not None:
            mine.send(self._engine)

    def _ended(self, index: int) -> None:
        worker = self._workers.pop(index)
        asyncio.get_running_loop().remove_reader(worker.process.sentinel)
        worker.process.join()
        code = worker.process.exitcode
        worker.process.close()
        failure = _last_words(worker.connection)
        worker.connection.close()
        self._client.forget(worker.name)
        if failure is not None:
            self._fail(error_of(failure.failure))
        elif not self._ending:
            self._replace(index, code)
        if self._ending and not self._workers:
            self._over.set()

    def _replace(self, index: int, code: int | None) -> None:
        how = f"API worker {index} ended with exit code {code}"
        now = time.monotonic()
        self._deaths.append(now)
        if sum(now - death < DEATH_WINDOW for death in self._deaths) >= MAX_DEATHS:
            self._fail(EngineDeadError(f"{how}, as {MAX_DEATHS} have within {DEATH_WINDOW:.0f} s: no other is started"))
            return
        log.error("%s: another is started", how)
        asyncio.get_running_loop().call_later(RESTART_SECONDS, self._start_worker, index)

    def _tell(self, message: Launched | Died | GivenUp | Exit) -> None:
        for worker in self._workers.values():
            with contextlib.suppress(OSError):  # it has died, which its sentinel tells
                worker.connection.send(message)

    # ----------------------------------------------------------------------------------------------------- end

    def _exit(self) -> None:
        """The first time workers answer what they have, the second time they end at once."""
        if not self._ending:
            self._ending = True
            asyncio.get_running_loop().call_later(self._drain_timeout + LAST_SECONDS, self._kill)
        self._tell(Exit())
        if not self._workers:
            self._over.set()

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._exit()

    def _kill(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()

    # ------------------------------------------------------------------------------------------------- Watcher

    def engine_launched(self, addresses: Addresses) -> None:
        status = self._client.status()
        self._engine = Launched(addresses, status.restarts + 1, status.counters)
        self._tell(self._engine)

    def engine_died(self, how: str) -> None:
        self._engine = None
        self._tell(Died(how))

    def engine_given_up(self, why: str) -> None:
        self._tell(GivenUp(why))
        self._fail(EngineDeadError(f"no engine is left: {why}"))


class _Both:
    """A Watcher that tells this process's own client first, then the workers."""

    def __init__(self, client: ZmqClient, workers: Workers) -> None:
        self._watchers = (client, workers)

    def engine_launched(self, addresses: Addresses) -> None:
        for one in self._watchers:
            one.engine_launched(addresses)

    def engine_died(self, how: str) -> None:
        for one in self._watchers:
            one.engine_died(how)

    def engine_given_up(self, why: str) -> None:
        for one in self._watchers:
            one.engine_given_up(why)


def _last_words(connection: Connection) -> Failed | None:
    try:
        return connection.recv() if connection.poll() else None
    except (EOFError, OSError):
        return None
