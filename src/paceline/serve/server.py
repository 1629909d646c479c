"""The process around the application: its socket, uvicorn, and an end that lets running answers finish."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import time
from dataclasses import dataclass, replace
from types import FrameType

import uvicorn

from paceline.errors import EngineDeadError, PacelineError, UsageError
from paceline.log import get_logger
from paceline.serve.app import create_app
from paceline.serve.service import Service

log = get_logger(__name__)

_LAST_WORDS_SECONDS = 5  # for the sockets of answers that were cut short


@dataclass(frozen=True)
class ListenOptions:
    """Where the server listens. `drain_timeout`: seconds that answers have to finish in after SIGTERM."""

    host: str = "127.0.0.1"
    port: int = 8000
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = None
    log_level: str = "warning"
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise UsageError("--ssl-keyfile needs --ssl-certfile")
        if self.ssl_certfile is not None:
            try:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, self.ssl_keyfile_password or "")
            except (OSError, ssl.SSLError) as error:
                raise UsageError(
                    f"--ssl-certfile '{self.ssl_certfile}' and its key cannot be used: {error.strerror or error}"
                ) from None

    def url_at(self, port: int) -> str:
        """Where clients find it; `port` is the one that was bound."""
        scheme = "http" if self.ssl_certfile is None else "https"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{port}"


def listen_shared(options: ListenOptions, count: int) -> list[socket.socket]:
    """Sockets on one port, among which the kernel deals connections out."""
    # One that shares the port with nobody first: the others could join those of a server that is there.
    with listen(options) as alone:
        port: int = alone.getsockname()[1]
    return [listen(replace(options, port=port), shared=True) for _ in range(count)]


def listen(options: ListenOptions, *, shared: bool = False) -> socket.socket:
    """The bound socket. Before a model is loaded, so that a port in use is told at once."""
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host '{options.host}' is not an address of this machine: {error}") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = (
                f"port {options.port} is in use on {options.host}: end what listens there, or choose another --port"
            )
        elif error.errno == errno.EACCES:
            message = f"port {options.port} may not be used by this user: choose one above 1023 with --port"
        else:
            message = f"cannot listen on {options.host} port {options.port}: {error.strerror}"
        raise PacelineError(message) from None
    return listener


def run_server(service: Service, options: ListenOptions, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, and drain. Raises what the start failed with, EngineDeadError where the engine has
    died for good."""
    make_server(service, options).run(sockets=[listener])
    if service.failure is not None:
        raise service.failure


def make_server(service: Service, options: ListenOptions, kind: type[DrainingServer] | None = None) -> DrainingServer:
    """uvicorn, set up for `service`; `run(sockets=[...])` serves."""
    config = uvicorn.Config(
        create_app(service),
        http="httptools",
        ws="none",
        loop="uvloop",
        lifespan="on",
        access_log=False,  # the gate's own lines have the request's id
        log_config=None,
        log_level=options.log_level,
        server_header=False,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        ssl_keyfile_password=options.ssl_keyfile_password,
        timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
        backlog=2048,
    )
    logging.getLogger("uvicorn.error").setLevel(options.log_level.upper())
    return (kind or DrainingServer)(config, service, options.drain_timeout)


class DrainingServer(uvicorn.Server):
    """uvicorn, but the first signal only ends the taking of requests (503) and the exit comes when none is answered any
    more, or after `drain_timeout`; a second signal ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_timeout: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_timeout = drain_timeout
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._deadline is None and self._service.is_loaded:
            self._service.draining = True
            self._deadline = time.monotonic() + self._drain_timeout
            log.info("ending: %d requests run, waiting up to %.0f s", self._service.num_in_flight, self._drain_timeout)
        else:
            # Not super(): it would raise the signal again after the shutdown, and the exit code would be the signal's.
            self.force_exit = self.should_exit
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second whether to end."""
        if self._service.failure is not None:
            self.should_exit = True
        elif self._service.is_loaded and not self.should_exit:
            status = self._service.client.status()
            if not status.alive and not self._service.draining:
                # Whoever started this process can start another, perhaps elsewhere; it could only answer 503.
                self._service.failure = EngineDeadError(f"no engine is left: {status.reason}")
                self.should_exit = True
        if self._deadline is not None and not self.should_exit:
            if self._service.num_in_flight == 0:
                self.should_exit = True
            elif time.monotonic() >= self._deadline:
                await self._service.close()  # answers end with an error event, and are sent before the sockets close
                self.should_exit = True
        return await super().on_tick(counter)
