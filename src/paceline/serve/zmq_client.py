"""`ZmqClient`: the engine in a process of its own, watched. If it dies, its requests go on in the next one.

A request is resumed from the tokens that its caller has got: the new engine computes prompt and tokens as one prompt,
and as each draw depends on the seed and the position alone, the text goes on as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec
import zmq

from paceline.engine.load_options import LoadOptions
from paceline.errors import EngineDeadError, PacelineError
from paceline.log import get_logger
from paceline.serve.admission import QueueLimits
from paceline.serve.client import (
    EngineCounters,
    EngineStatus,
    ModelInfo,
    Startup,
)
from paceline.serve.engine_process import Addresses, EngineSpec
from paceline.serve.failures import error_of
from paceline.serve.health import Deadlines, added, status_of
from paceline.serve.messages import (
    Beat,
    Forget,
    Hello,
    Load,
    LoadFailed,
    Ready,
    Shutdown,
    ToEngine,
    decode_beat,
    decode_from_engine,
    encode,
)
from paceline.serve.streams import StreamTable
from paceline.serve.supervisor import Supervisor, Watcher
from paceline.serve.table_client import TableClient

log = get_logger(__name__)

STOP_SECONDS = 5.0  # that an engine has to end by itself


class _Socket:
    """A ZeroMQ socket on an event loop, without a future a message.

    ZeroMQ's descriptor tells of changes only, and a send may take one away: so it is read empty after each.
    """

    def __init__(self, kind: int, address: str, deliver: Callable[[bytes], None], name: bytes | None = None) -> None:
        """`name`: what the other side calls this one; it makes one up without."""
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self._socket.set_hwm(0)
        if name is not None:
            self._socket.setsockopt(zmq.ROUTING_ID, name)
        if kind == zmq.SUB:
            self._socket.subscribe(b"")
        self._socket.connect(address)
        self._descriptor: int = self._socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._descriptor, self.drain)

    def send(self, data: bytes) -> None:
        self._socket.send(data, zmq.NOBLOCK)
        self._loop.call_soon(self.drain)

    def drain(self) -> None:
        """Deliver all that has arrived."""
        while not self._socket.closed:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._deliver(data)

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._descriptor)
            self._socket.close(linger=0)


class EngineOwner(Protocol):
    """Who starts and ends engines, and tells a Watcher: a Supervisor, or what stands for one in another process.

    `restart`: whether an engine that ends is followed by another. `owns_engine`: whether the client decides over the
    engine's life: it ends with the client, and one that cannot load ends the client's start.
    """

    restart: bool
    owns_engine: bool
    num_launches: int

    @property
    def pid(self) -> int | None: ...

    def launch(self) -> None: ...

    def kill(self) -> None: ...

    async def stop(self, timeout: float) -> None: ...


def supervised(
    options: LoadOptions,
    *,
    limits: QueueLimits | None = None,
    threads: int | None = None,
    log_level: int = logging.WARNING,
) -> Callable[[Watcher], Supervisor]:
    """The owner that starts engines of its own. `threads`: torch's CPU threads in their process; `log_level`: of its
    loggers."""
    spec = EngineSpec(pickle.dumps(options), limits or QueueLimits(), threads, log_level)
    return partial(Supervisor, spec)


class ZmqClient(TableClient):
    """An EngineClient of an owner's engines, made for it. `name`: what the engine calls this client (see Forget)."""

    def __init__(
        self,
        make_owner: Callable[[ZmqClient], EngineOwner],
        *,
        deadlines: Deadlines | None = None,
        name: bytes | None = None,
    ) -> None:
        super().__init__(StreamTable(self._send), deadlines or Deadlines())
        self._supervisor = make_owner(self)
        self._name = name
        self._first: asyncio.Future[ModelInfo] | None = None
        self._requests: _Socket | None = None
        self._beats: _Socket | None = None
        self._beat, self._beat_at = Beat(Startup(), Load()), time.monotonic()
        self._earlier = EngineCounters()  # of engines that are gone
        self._resume_timer: asyncio.TimerHandle | None = None

    # -------------------------------------------------------------------------------------------- EngineClient

    async def start(self) -> None:
        self._first = asyncio.get_running_loop().create_future()
        self._supervisor.launch()
        self._info = await self._first
        self._supervisor.restart = True

    async def close(self, drain_timeout: float = 0.0) -> None:
        if self._state == "closed":
            return
        self._supervisor.restart = False
        if self._state == "ready":
            self._state = "draining"
            await self._table.drain(drain_timeout)
            if self._supervisor.owns_engine:
                self._send(Shutdown())
        else:
            self._table.fail_all(EngineDeadError("the server shuts down"))
            self._fail_start(EngineDeadError("the server shuts down"))
            self._supervisor.kill()
        self._state = "closed"
        await self._supervisor.stop(STOP_SECONDS)
        self._disconnect()

    @property
    def engine_pid(self) -> int | None:
        """The engine's process, None where there is none now."""
        return self._supervisor.pid

    def forget(self, name: bytes) -> None:
        """Another client of the same engine, of this name, is gone: the engine drops its requests."""
        self._send(Forget(name))

    def status(self) -> EngineStatus:
        if self._beats is not None:
            self._beats.drain()  # beats that this process was too busy to take are no silence of the engine
        beat = self._beat
        if self._state == "ready" and not self.info.phases.keys() <= beat.startup.phases.keys():
            # The beat is older than the end of the start.
            beat = msgspec.structs.replace(beat, startup=Startup(self.info.phases))
        return status_of(
            self._state,
            self._reason,
            beat,
            time.monotonic() - self._beat_at,
            self._deadlines,
            restarts=max(0, self._supervisor.num_launches - 1),
            earlier=self._earlier,
        )

    # ------------------------------------------------------------------------------------------------- Watcher

    def engine_launched(self, addresses: Addresses) -> None:
        self._requests = _Socket(zmq.DEALER, addresses.requests, self._receive, self._name)
        self._beats = _Socket(zmq.SUB, addresses.beats, self._receive_beat)
        self._requests.send(encode(Hello()))

    def engine_died(self, how: str) -> None:
        for socket in (self._beats, self._requests):
            if socket is not None:
                socket.drain()  # what it has sent before is as good as ever
        self._disconnect()
        if self._state == "closed":
            return
        self._earlier = added(self._earlier, self._beat.load.counters)
        self._beat, self._beat_at = Beat(Startup(), Load()), time.monotonic()
        self._reason = f"the engine {how}"
        if self._info is None:
            self._fail_start(EngineDeadError(f"the engine {how} before it was ready"))
            return
        log.error("the engine %s with %d requests in flight: another is started", how, len(self._table))
        if self._state == "draining":
            self._table.fail_all(EngineDeadError(self._reason))
            return
        self._state = "restarting"
        if self._resume_timer is None:
            loop = asyncio.get_running_loop()
            self._resume_timer = loop.call_later(self._deadlines.resume, self._give_up_requests)

    def engine_given_up(self, why: str) -> None:
        log.error("%s: no other is started", why)
        self._state, self._reason = "dead", why
        self._give_up_requests()

    def count_from(self, counters: EngineCounters) -> None:
        """What the engines before this one have counted, where another client has seen more of them."""
        self._earlier = counters

    # -------------------------------------------------------------------------------------------------- inside

    def _send(self, message: ToEngine) -> None:
        if self._requests is not None:
            self._requests.send(encode(message))

    def _receive(self, data: bytes) -> None:
        message = decode_from_engine(data)
        match message:
            case Ready():
                self._on_ready(message.info)
            case LoadFailed():
                self._reason = message.failure.message
                if self._info is not None:
                    log.error("the next engine could not load the model: %s", self._reason)
                self._fail_start(error_of(message.failure))
            case _:
                self._table.receive(message)

    def _on_ready(self, info: ModelInfo) -> None:
        self._info, self._state, self._reason = info, "ready", None
        if self._first is not None and not self._first.done():
            self._first.set_result(info)
        if self._resume_timer is not None:
            self._resume_timer.cancel()
            self._resume_timer = None
        self._beat_at = time.monotonic()
        self._table.resume_all()

    def _receive_beat(self, data: bytes) -> None:
        self._beat, self._beat_at = decode_beat(data), time.monotonic()

    def _fail_start(self, error: PacelineError) -> None:
        """The first engine could not load: there is no second, since nothing has changed."""
        if self._info is None and self._supervisor.owns_engine:
            self._state, self._reason = "dead", str(error)
            if self._first is not None and not self._first.done():
                self._first.set_exception(error)

    def _give_up_requests(self) -> None:
        self._resume_timer = None
        self._table.fail_all(EngineDeadError(f"{self._reason}, and no other was ready in time: ask again later"))

    def _disconnect(self) -> None:
        for socket in (self._requests, self._beats):
            if socket is not None:
                socket.close()
        self._requests = self._beats = None
