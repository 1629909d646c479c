"""What the loop of every engine does, in whatever thread or process it runs: take messages, step, send what changed.

While nothing is to be computed it warms up, a piece at a time, and then waits in `Port.receive`, without CPU.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol

from paceline.engine.warm_up import WarmUp
from paceline.errors import PacelineError
from paceline.serve.admission import QueueLimits, WaitingRoom
from paceline.serve.client import ModelInfo
from paceline.serve.failures import failure_of
from paceline.serve.messages import (
    Abort,
    Encode,
    EndAnswer,
    Forget,
    FromEngine,
    Hello,
    Load,
    Ready,
    Refused,
    Shutdown,
    Submit,
    ToEngine,
)


class Port(Protocol):
    """Where messages come from and go to. A client is named by bytes of the port's own choosing."""

    def receive(self, *, wait: bool) -> list[tuple[bytes, ToEngine]]:
        """What has arrived; with `wait`, at least one message."""

    def send(self, client: bytes, message: FromEngine) -> None: ...


class Loop(ABC):
    """One engine and its clients. Not thread-safe but for the reading of `load`, `last_step` and `busy_since`."""

    def __init__(self, info: ModelInfo, limits: QueueLimits, port: Port, warm_up: WarmUp | None = None) -> None:
        self._info = info
        self._warm_up = warm_up
        self._port = port
        self._waiting = WaitingRoom(limits)
        self._gone: set[bytes] = set()  # clients whose messages may still come
        self._num_steps = self._num_requests = self._num_prompt_tokens = 0
        self.load = Load()
        self.last_step: float | None = None  # when the last one ended, on time.monotonic's clock
        self.busy_since: float | None = None  # when it began to have work, None without

    def run(self) -> None:
        """Until a Shutdown. An exception of the engine ends it: what the requests have got, their clients know."""
        while True:
            warm = self._warm_up is None or self._warm_up.over
            for client, message in self._port.receive(wait=warm and not self._has_work):
                if isinstance(message, Shutdown):
                    return
                self._handle(client, message)
            if self._has_work:
                self.busy_since = self.busy_since or time.monotonic()
                self._step()
            elif self._warm_up is not None:
                self._warm_up.step()
            if not self._has_work:
                self.busy_since = None
            self.load = self._measure()

    def _handle(self, client: bytes, message: Hello | Submit | Encode | EndAnswer | Abort | Forget) -> None:
        if client in self._gone:
            return
        match message:
            case Hello():
                self._port.send(client, Ready(self._info))
            case Submit() | Encode():
                try:
                    self._take(client, message)
                except PacelineError as error:
                    self._port.send(client, Refused(message.request.request_id, message.number, failure_of(error)))
            case EndAnswer():
                self._end_answer(message)
            case Abort():
                self._abort(message.request_id)
            case Forget():
                self._gone.add(message.client)
                for request_id in list(self._requests_of(message.client)):
                    self._abort(request_id)

    @property
    @abstractmethod
    def _has_work(self) -> bool: ...

    @abstractmethod
    def _take(self, client: bytes, message: Submit | Encode) -> None:
        """A new request. Raises what it is refused with."""

    @abstractmethod
    def _end_answer(self, message: EndAnswer) -> None:
        """See EngineClient.end_answer."""

    @abstractmethod
    def _abort(self, request_id: str) -> None: ...

    @abstractmethod
    def _requests_of(self, client: bytes) -> Iterable[str]: ...

    @abstractmethod
    def _step(self) -> None: ...

    @abstractmethod
    def _measure(self) -> Load: ...
