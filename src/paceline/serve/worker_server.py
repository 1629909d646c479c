"""The inside of an API worker; see worker.py, which sets its process up."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from paceline.errors import PacelineError
from paceline.log import get_logger
from paceline.serve.failures import failure_of
from paceline.serve.health import Deadlines
from paceline.serve.relay import Failed, RelayedEngine
from paceline.serve.server import DrainingServer, ListenOptions, make_server
from paceline.serve.service import Service
from paceline.serve.settings import ServerSettings
from paceline.serve.text import TextOptions
from paceline.serve.zmq_client import ZmqClient

log = get_logger(__name__)


@dataclass(frozen=True)
class WorkerOptions:
    settings: ServerSettings
    text: TextOptions
    where: ListenOptions
    deadlines: Deadlines = field(default_factory=Deadlines)


class _WorkerServer(DrainingServer):
    """One that its owner tells to end, not a signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve_as_worker(options: WorkerOptions, name: bytes, listener: socket.socket, connection: Connection) -> bool:
    """Serve until the owner says Exit. Whether it failed, which the owner was told."""
    try:
        failure = _serve(options, name, listener, connection)
    except Exception as error:
        failure = error
    if failure is not None:
        if not isinstance(failure, PacelineError):
            log.error("an API worker failed: a bug in paceline", exc_info=failure)
        connection.send(Failed(failure_of(failure)))
    return failure is not None


def _serve(options: WorkerOptions, name: bytes, listener: socket.socket, connection: Connection) -> Exception | None:
    def exit_once_more() -> None:
        server.handle_exit(signal.SIGTERM, None)

    client = ZmqClient(
        lambda watcher: RelayedEngine(connection, watcher, exit_once_more), deadlines=options.deadlines, name=name
    )
    service = Service(client, options.settings, options.text.load)
    server = make_server(service, options.where, _WorkerServer)
    server.run(sockets=[listener])
    return service.failure
