"""Starts an engine's process, sees it end, starts another. What that means to requests is the client's affair."""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Protocol

from paceline.log import get_logger
from paceline.serve.engine_process import Addresses, EngineSpec, run_engine_process

log = get_logger(__name__)

MAX_DEATHS = 5  # within the window; then no further engine is started
DEATH_WINDOW = 120.0  # seconds
LONGEST_BACKOFF = 8.0  # seconds before a start; none before the first, then 1, 2, 4, ...
LONGEST_DIRECTORY = 80  # characters: a socket's path may have 107


class Watcher(Protocol):
    """Told, on the event loop, of each engine that is started or ends."""

    def engine_launched(self, addresses: Addresses) -> None: ...

    def engine_died(self, how: str) -> None: ...

    def engine_given_up(self, why: str) -> None: ...


class Supervisor:
    """One engine at a time. `restart` says whether one that ends is followed by another. Belongs to one event loop."""

    def __init__(
        self,
        spec: EngineSpec,
        watcher: Watcher,
        *,
        clock: Callable[[], float] = time.monotonic,
        target: Callable[[EngineSpec, Addresses], None] = run_engine_process,
    ) -> None:
        self._spec = spec
        self._watcher = watcher
        self._clock = clock
        self._target = target
        self._process: BaseProcess | None = None
        self._directory: str | None = None
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._next: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.restart = False
        self.owns_engine = True
        self.num_launches = 0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Start an engine's process and tell the watcher where it will listen."""
        self._next = None
        if self._directory is None:
            where = tempfile.gettempdir()
            self._directory = tempfile.mkdtemp(
                prefix="paceline-", dir="/tmp" if len(where) > LONGEST_DIRECTORY else where
            )
        self.num_launches += 1
        stem = f"ipc://{self._directory}/{self.num_launches}"
        addresses = Addresses(f"{stem}-requests", f"{stem}-beats")
        # spawn: a fork would copy the API's threads' locks, and CUDA does not outlive one.
        process = multiprocessing.get_context("spawn").Process(
            target=self._target, args=(self._spec, addresses), name="paceline-engine"
        )
        process.start()
        self._process = process
        self._idle.clear()
        asyncio.get_running_loop().add_reader(process.sentinel, self._ended)
        self._watcher.engine_launched(addresses)

    def _ended(self) -> None:
        process = self._process
        assert process is not None
        asyncio.get_running_loop().remove_reader(process.sentinel)
        process.join()
        code = process.exitcode or 0
        process.close()
        self._process = None
        self._idle.set()
        self._watcher.engine_died(f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}")
        if self.restart:
            self._plan_next()

    def _plan_next(self) -> None:
        now = self._clock()
        self._deaths.append(now)
        recent = sum(now - death < DEATH_WINDOW for death in self._deaths)
        if recent >= MAX_DEATHS:
            self._watcher.engine_given_up(f"the engine died {recent} times within {DEATH_WINDOW:.0f} s")
            return
        delay = 0.0 if recent == 1 else min(LONGEST_BACKOFF, 2.0 ** (recent - 2))
        self._next = asyncio.get_running_loop().call_later(delay, self.launch)

    async def stop(self, timeout: float) -> None:
        """Wait for the engine to end, which it was told; after `timeout` seconds kill it. No other is started."""
        self.restart = False
        if self._next is not None:
            self._next.cancel()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            self.kill()
            await self._idle.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
