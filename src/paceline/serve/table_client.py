"""`TableClient`: what a client of an engine does by its table of streams, wherever the engine runs."""

from __future__ import annotations

from abc import ABC, abstractmethod

from paceline.errors import EngineDeadError
from paceline.serve.client import (
    EncodeRequest,
    Encoding,
    EngineState,
    EngineStatus,
    GenerateRequest,
    ModelInfo,
    RequestStream,
)
from paceline.serve.health import Deadlines
from paceline.serve.streams import StreamTable


class TableClient(ABC):
    """The part of an EngineClient that is the same for an engine in a thread and in a process."""

    def __init__(self, table: StreamTable, deadlines: Deadlines) -> None:
        self._table = table
        self._deadlines = deadlines
        self._state: EngineState = "starting"
        self._reason: str | None = None
        self._info: ModelInfo | None = None

    @abstractmethod
    def status(self) -> EngineStatus: ...

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise EngineDeadError("the engine has not loaded its model yet: wait until it is ready")
        return self._info

    async def submit(self, request: GenerateRequest) -> RequestStream:
        self._check_ready()
        return await self._table.submit(request)

    async def encode(self, request: EncodeRequest) -> Encoding:
        self._check_ready()
        return await self._table.encode(request)

    def _check_ready(self) -> None:
        status = self.status()
        if not status.ready:
            raise EngineDeadError(f"the engine takes no request now: {status.reason or status.state}")

    async def end_answer(self, request_id: str, index: int) -> None:
        self._table.end_answer(request_id, index)

    async def abort(self, request_id: str) -> None:
        self._table.abort(request_id)
