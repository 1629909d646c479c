"""The engine's own process: it loads a model, serves it over ZeroMQ, and beats from a second thread.

It ends on a Shutdown, on an exception of the engine (its supervisor starts another) and with its parent. No torch at
import: the beats begin before the seconds that takes.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from paceline.errors import PacelineError
from paceline.log import get_logger
from paceline.phases import Phases
from paceline.serve.admission import QueueLimits
from paceline.serve.client import Startup
from paceline.serve.messages import Beat, FromEngine, Load, ToEngine, decode_to_engine, encode

log = get_logger(__name__)

LINGER_MS = 1000  # for the last messages of a process that ends
# oneDNN and torch's layer over it each keep what they made for a number of rows and a weight's shape: 1024 entries, of
# 0.4 MB for a weight of 576 x 1536 and 2 MB for one of 2048 x 8192, in bfloat16. Steps of ever new lengths fill them: a
# tiny model came to 874 MB of RSS after 4,000 requests, to 264 MB with 16 entries, to 339 MB with 128. To make one
# again takes 0.5 ms; 128 hold what a model's five shapes need for 25 numbers of rows.
ONEDNN_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
ONEDNN_ENTRIES = 128


@dataclass(frozen=True)
class EngineSpec:
    """What a process is to run. `options`: a pickled LoadOptions, opened there once the beats have begun. `threads`:
    torch's CPU threads. `log_level`: of paceline's loggers, on stderr."""

    options: bytes
    limits: QueueLimits
    threads: int | None = None
    log_level: int = logging.WARNING
    beat_seconds: float = 0.25


@dataclass(frozen=True)
class Addresses:
    """ZeroMQ endpoints of one engine process, its own: no message of an engine that died reaches the next."""

    requests: str
    beats: str


def run_engine_process(spec: EngineSpec, addresses: Addresses) -> None:
    """The process's main function."""
    # Ctrl-C and a service manager's SIGTERM reach the whole group: the API's process drains, then ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: engine: %(message)s")
    logging.getLogger("paceline").setLevel(spec.log_level)
    for name in ONEDNN_CACHES:
        os.environ.setdefault(name, str(ONEDNN_ENTRIES))
    phases = Phases()
    context = zmq.Context()
    beats = _Beats(context, addresses.beats, spec.beat_seconds, phases)
    beats.start()
    try:
        port = ZmqPort(context, addresses.requests)
        with phases.time("imports"):
            from paceline.serve.host import EngineHost

            options = pickle.loads(spec.options)
        host = EngineHost(phases)
        beats.measure = host.beat
        host.run(options, spec.threads, spec.limits, port)
    except PacelineError as error:  # no bug here: a rank has died, and the message says how
        log.error("%s", error, exc_info=log.isEnabledFor(logging.DEBUG))
        sys.exit(1)
    finally:
        beats.stop()
        context.destroy(linger=LINGER_MS)


class ZmqPort:
    """A Port over a ROUTER socket: ZeroMQ names the clients."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.ROUTER)
        # What is sent is bounded by what was accepted; a bound here would drop tokens.
        self._socket.set_hwm(0)
        self._socket.bind(address)

    def receive(self, *, wait: bool) -> list[tuple[bytes, ToEngine]]:
        messages: list[tuple[bytes, ToEngine]] = []
        if wait:
            self._socket.poll()
        while True:
            try:
                client, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                messages.append((client, decode_to_engine(data)))
            except msgspec.DecodeError:
                log.exception("a message that is none was dropped")

    def send(self, client: bytes, message: FromEngine) -> None:
        self._socket.send_multipart((client, encode(message)))


class _Beats(threading.Thread):
    """Publishes a Beat several times a second, and ends the process when its parent is gone."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, interval: float, phases: Phases) -> None:
        super().__init__(name="paceline-beats", daemon=True)
        self.measure: Callable[[], Beat] = lambda: Beat(Startup(dict(phases.seconds), phases.current), Load())
        self._socket = context.socket(zmq.PUB)
        self._socket.bind(address)
        self._interval = interval
        self._over, self._end = multiprocessing.Pipe(duplex=False)

    def run(self) -> None:
        parent = multiprocessing.parent_process()
        waited_for: list[Any] = [self._over] if parent is None else [self._over, parent.sentinel]
        while True:
            self._socket.send(encode(self.measure()))
            ended = multiprocessing.connection.wait(waited_for, self._interval)
            if self._over in ended:
                return
            if ended:
                os._exit(1)  # whatever the engine is in: nobody is left to ask for it

    def stop(self) -> None:
        self._end.close()
        self.join()
