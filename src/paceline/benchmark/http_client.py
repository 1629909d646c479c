"""A client that costs little a chunk: it keeps what comes with the time at which it came, and parses it afterwards.

HTTP/1.1 over asyncio's protocols and httptools' parser. No redirects, proxies or compression: what is measured is the
server.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from paceline.errors import UsageError


@dataclass
class Response:
    """`pieces`: the body as it arrived, each piece with its time on time.perf_counter's clock."""

    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


class HttpClient:
    """One server. Connections are kept and used again; as many are opened as requests run at once."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """`url`: its root, with or without "/v1". Raises UsageError for what is none."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UsageError(f"'{url}' is not the URL of a server, as in http://127.0.0.1:8000")
        self._host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._path}"
        lines = [f"Host: {parts.netloc}", "Content-Type: application/json", "User-Agent: paceline-bench"]
        if api_key is not None:
            lines.append(f"Authorization: Bearer {api_key}")
        self._headers = "\r\n".join(lines)
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str, body: bytes = b"") -> Response:
        """Send and read to the end. Raises OSError where the connection fails or what comes is not HTTP."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}\r\nContent-Length: {len(body)}\r\n\r\n"
        data = head.encode("latin-1") + body
        connection = self._take()
        if connection is not None:
            try:
                return await self._exchange(connection, data)
            except ConnectionResetError:
                if connection.response.status:
                    raise
                # It was closed for idleness while the request was on its way: a new one tells.
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return await self._exchange(connection, data)

    async def _exchange(self, connection: _Connection, data: bytes) -> Response:
        try:
            response = await connection.exchange(data)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return response

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class _Connection(asyncio.Protocol):
    """One request at a time. Also httptools' callbacks, those whose names begin with `on_`."""

    def __init__(self) -> None:
        self.response = Response()
        self._transport: asyncio.WriteTransport | None = None
        self._done: asyncio.Future[Response] | None = None
        self._now = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def exchange(self, data: bytes) -> asyncio.Future[Response]:
        """The response to `data`, a whole request."""
        self.response = Response()
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        if self._transport is None or self._transport.is_closing():
            self._end(ConnectionResetError("the connection was closed"))
        else:
            self._transport.write(data)
        return self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _end(self, error: OSError | None = None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(self.response)
            else:
                self._done.set_exception(error)

    # ------------------------------------------------------------------------------------- asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(OSError(f"what came is not HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._end(ConnectionResetError("the server closed the connection before its answer was whole"))

    # ------------------------------------------------------------------------------------ httptools' callbacks

    def on_headers_complete(self) -> None:
        self.response.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.response.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        self._end()
