"""`InProcessClient`: the engine in a thread of this process. No supervision: what ends the engine ends the client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from paceline.engine.load_options import LoadOptions
from paceline.errors import EngineDeadError
from paceline.log import get_logger
from paceline.phases import Phases
from paceline.serve.admission import QueueLimits
from paceline.serve.client import EngineStatus, ModelInfo
from paceline.serve.failures import error_of
from paceline.serve.health import Deadlines, status_of
from paceline.serve.host import EngineHost
from paceline.serve.messages import FromEngine, Hello, LoadFailed, Ready, Shutdown, ToEngine
from paceline.serve.streams import StreamTable
from paceline.serve.table_client import TableClient

log = get_logger(__name__)


class _ThreadPort:
    """Queues between the engine's thread and an event loop."""

    def __init__(self, deliver: Callable[[FromEngine], None]) -> None:
        self.inbox: SimpleQueue[ToEngine] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver

    def receive(self, *, wait: bool) -> list[tuple[bytes, ToEngine]]:
        messages: list[tuple[bytes, ToEngine]] = [(b"", self.inbox.get())] if wait else []
        try:
            while True:
                messages.append((b"", self.inbox.get_nowait()))
        except Empty:
            return messages

    def send(self, client: bytes, message: FromEngine) -> None:
        self.call(self._deliver, message)

    def call(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended: nobody waits for it
            self._loop.call_soon_threadsafe(function, *args)


class InProcessClient(TableClient):
    """An EngineClient. `threads`: torch's CPU threads, for the whole process."""

    def __init__(
        self,
        options: LoadOptions,
        *,
        limits: QueueLimits | None = None,
        deadlines: Deadlines | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(StreamTable(self._send), deadlines or Deadlines())
        self._options = options
        self._limits = limits or QueueLimits()
        self._threads = threads
        self._host = EngineHost(Phases())
        self._port: _ThreadPort | None = None

    async def start(self) -> None:
        self._ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._port = _ThreadPort(self._receive)
        self._send(Hello())
        # A daemon: a load that is going on cannot be stopped, and must not keep the process.
        threading.Thread(target=self._run, args=(self._port,), name="paceline-engine", daemon=True).start()
        self._info = await self._ready
        self._state = "ready"

    def _run(self, port: _ThreadPort) -> None:
        error: BaseException | None = None
        try:
            self._host.run(self._options, self._threads, self._limits, port)
        except Exception as raised:
            log.exception("the engine died")
            error = raised
        port.call(self._on_end, error)

    def _send(self, message: ToEngine) -> None:
        if self._port is not None:
            self._port.inbox.put(message)

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(message.info)
            case LoadFailed():
                self._fail(message.failure.message)
                if not self._ready.done():
                    self._ready.set_exception(error_of(message.failure))
            case _:
                self._table.receive(message)

    def _on_end(self, error: BaseException | None) -> None:
        self._ended.set()
        if error is not None:
            self._fail(f"the engine died: {type(error).__name__}: {error}")
            if not self._ready.done():
                self._ready.set_exception(error)

    def _fail(self, reason: str) -> None:
        self._state, self._reason = "dead", reason
        self._table.fail_all(EngineDeadError(reason))

    async def close(self, drain_timeout: float = 0.0) -> None:
        if self._state == "closed":
            return
        if self._state == "ready":
            self._state = "draining"
            await self._table.drain(drain_timeout)
        self._state = "closed"
        self._send(Shutdown())
        if self._info is not None:  # else it still loads, and will see the Shutdown when it has
            await self._ended.wait()
        self._host = EngineHost(Phases())  # gives the model back

    def status(self) -> EngineStatus:
        return status_of(self._state, self._reason, self._host.beat(), 0.0, self._deadlines)
