"""The client of `bench serve`, against a server that sends what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from paceline.benchmark.http_client import HttpClient
from paceline.errors import UsageError

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Work = Callable[[HttpClient], Awaitable[object]]


def against(answers: list[list[bytes] | None], work: Work) -> tuple[object, list[bytes], int]:
    """The result of `work` with a server that answers the requests of all connections in turn, each in pieces; None
    closes the connection instead. Also the requests and how many connections there were."""
    seen: list[bytes] = []
    connections = 0
    handlers: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        handlers.append(asyncio.current_task())
        while data := await reader.read(65536):
            seen.append(data)
            pieces = answers.pop(0)
            for piece in pieces or ():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            if pieces is None or b"close" in pieces[0]:
                break
        writer.close()
        await writer.wait_closed()

    async def main() -> object:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/", "secret")
        try:
            return await work(client)
        finally:
            client.close()
            server.close()
            await asyncio.gather(*filter(None, handlers), return_exceptions=True)

    result = asyncio.run(asyncio.wait_for(main(), 10))
    return result, seen, connections


def test_pieces_have_the_times_at_which_they_came():
    head = b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n"
    response, (request,), _ = against(
        [[head, b"1\r\na\r\n", b"2\r\nbc\r\n", b"0\r\n\r\n"]], lambda client: client.request("POST", "/v1/x", b"{}")
    )
    assert response.status == 201
    assert response.body == b"abc"
    (first, _), (second, _) = response.pieces
    assert second - first > 0.005
    assert request.startswith(b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer secret\r\n" in request
    assert request.endswith(b"\r\nContent-Length: 2\r\n\r\n{}")


async def twice(client: HttpClient) -> tuple[bytes, bytes]:
    first = await client.request("GET", "/")
    await asyncio.sleep(0.05)
    return first.body, (await client.request("GET", "/")).body


def test_a_connection_is_used_again():
    bodies, _, connections = against([[OK], [OK]], twice)
    assert bodies == (b"ok", b"ok")
    assert connections == 1


def test_one_that_was_closed_meanwhile_is_not():
    bodies, _, connections = against([[OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")], [OK]], twice)
    assert bodies == (b"ok", b"ok")
    assert connections == 2


def test_one_that_closes_on_the_second_request_is_replaced():
    bodies, seen, connections = against([[OK], None, [OK]], twice)
    assert bodies == (b"ok", b"ok")
    assert (len(seen), connections) == (3, 2)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "closed the connection"),
        ([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nok"], "closed the connection"),
        ([b"SSH-2.0 hello\r\n"], "not HTTP"),
    ],
)
def test_what_is_no_whole_answer(answer, says):
    with pytest.raises(OSError, match=says):
        against([answer], lambda client: client.request("GET", "/"))


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "http://host:port", "http://host:99999"])
def test_what_is_no_url(url):
    with pytest.raises(UsageError, match="is not the URL of a server"):
        HttpClient(url)


def test_a_url_may_lack_its_scheme_and_have_a_path():
    assert HttpClient("localhost:8000").url == "http://localhost:8000"
    assert HttpClient("https://host/engine/v1").url == "https://host/engine"
