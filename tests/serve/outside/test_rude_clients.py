"""Clients that leave, stall or trickle: they cost the others nothing, and what they held is given back."""

from __future__ import annotations

import json
import socket
import struct
import time
from contextlib import ExitStack, contextmanager

import pytest

LONG = {"prompt": "hello", "max_tokens": 480, "temperature": 1, "ignore_eos": True, "n": 4}


@contextmanager
def connection(server, *, receive_buffer=None):
    with socket.socket() as one:
        if receive_buffer is not None:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        one.settimeout(60)
        one.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        yield one


def post(one, body):
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    one.sendall(f"{head}\r\n\r\n".encode() + data)


def reset(one):
    """Leave without a word: the peer gets RST where a closed connection would give FIN."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("leave", [reset, lambda one: None], ids=["reset", "closed"])
def test_a_client_that_leaves_ends_its_request(server, streamed, leave):
    before = server.gauge("paceline_generation_tokens_total")
    with connection(server) as one:
        post(one, {**LONG, "stream": streamed})
        server.wait_for(lambda: server.gauge("paceline_requests_running") > 0)
        if streamed:
            assert one.recv(100)
        leave(one)
    server.wait_until_idle()
    made = server.gauge("paceline_generation_tokens_total") - before
    assert made < LONG["n"] * LONG["max_tokens"]


def test_a_hundred_that_leave_at_once(server):
    with ExitStack() as stack:
        for number in range(100):
            one = stack.enter_context(connection(server))
            post(one, {**LONG, "stream": number % 2 == 0})
            if number % 3 == 0:
                reset(one)
    server.wait_until_idle()


def test_one_that_does_not_read_stops_nobody_and_loses_nothing(server):
    with connection(server, receive_buffer=4096) as slow:
        post(slow, {**LONG, "n": 2, "logprobs": 20, "stream": True})
        server.wait_for(lambda: server.gauge("paceline_requests_running") > 0)
        server.wait_until_idle()  # all is computed, and most of it waits in the server
        assert server.chat("hello").status_code == 200
        read = b""
        while not read.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = slow.recv(1 << 20)
            assert piece, read[-200:]
            read += piece
    assert read.count(b'"finish_reason":"length"') == 2


def test_one_that_never_reads_and_leaves(server):
    with connection(server, receive_buffer=4096) as slow:
        post(slow, {**LONG, "logprobs": 20, "stream": True})
        server.wait_for(lambda: server.gauge("paceline_requests_running") > 0)
        reset(slow)
    server.wait_until_idle()


def test_those_that_trickle_hold_up_nobody(server):
    """Two hundred requests that never get beyond half a head or half a body."""
    with ExitStack() as stack:
        for number in range(200):
            one = stack.enter_context(connection(server))
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
            one.sendall(head if number % 2 else head + b"content-length: 100\r\n\r\n{")
        start = time.monotonic()
        assert server.chat("hello").status_code == 200
        assert time.monotonic() - start < 10
        assert server.is_ready
