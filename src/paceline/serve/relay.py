"""What the owner of an engine and its API workers tell each other over a pipe, and the worker's end of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from paceline.serve.client import EngineCounters
from paceline.serve.engine_process import Addresses
from paceline.serve.messages import Failure
from paceline.serve.supervisor import Watcher

# -------------------------------------------------------------------------------------------------- to a worker


@dataclass(frozen=True)
class Launched:
    """An engine was started: the `number`th. `earlier`: what those before it have counted."""

    addresses: Addresses
    number: int
    earlier: EngineCounters


@dataclass(frozen=True)
class Died:
    how: str


@dataclass(frozen=True)
class GivenUp:
    why: str


@dataclass(frozen=True)
class Exit:
    """End as at a SIGTERM: the first time once all is answered, the second time at once."""


# ------------------------------------------------------------------------------------------------ from a worker


@dataclass(frozen=True)
class Failed:
    """The worker ends, and another would for the same reason."""

    failure: Failure


class RelayWatcher(Watcher, Protocol):
    def count_from(self, counters: EngineCounters) -> None: ...


class RelayedEngine:
    """An EngineOwner: that of the other process, as far as its messages tell. Belongs to one event loop."""

    def __init__(self, connection: Connection, watcher: RelayWatcher, on_exit: Callable[[], None]) -> None:
        self.restart = False
        self.owns_engine = False
        self.num_launches = 0
        self._connection = connection
        self._watcher = watcher
        self._on_exit = on_exit

    @property
    def pid(self) -> int | None:
        return None  # known to the owner

    def launch(self) -> None:
        """Listen: the owner launches."""
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._receive)

    def _receive(self) -> None:
        try:
            while self._connection.poll():
                self._handle(self._connection.recv())
        except (EOFError, OSError):
            os._exit(1)  # the owner was killed, and the engine ends with it

    def _handle(self, message: Launched | Died | GivenUp | Exit) -> None:
        match message:
            case Launched():
                self.num_launches = message.number
                self._watcher.count_from(message.earlier)
                self._watcher.engine_launched(message.addresses)
            case Died():
                self._watcher.engine_died(message.how)
            case GivenUp():
                self._watcher.engine_given_up(message.why)
            case Exit():
                self._on_exit()

    def kill(self) -> None:
        """The engine is the owner's."""

    async def stop(self, timeout: float) -> None:
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
