"""Tens of thousands of requests leave nothing behind, in neither process."""

from __future__ import annotations

import http.client
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ALL, STEP, CLIENTS = 50_000, 5_000, 8
MOST_GROWTH = 0.05  # after the first STEP


def rss(pid):
    """Resident bytes."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1))


def short_request(number):
    """The number-th of all: no two alike, every kind of answer, a refusal now and then."""
    body = {"max_tokens": 2 + number % 5, "stream": number % 3 == 0, "seed": number}
    extras = [{}, {"n": 2}, {"logprobs": 2}, {"stop": "e"}, {"temperature": 0}, {"temperature": -1}, {"echo": True}]
    if number % 2:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": f"request {number}"}]}
    return "/v1/completions", {**body, "prompt": f"request {number}", **extras[number // 2 % len(extras)]}


def send(server, numbers):
    """One after the other on a connection that is kept; every hundredth leaves before its answer is there."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    for number in numbers:
        path, body = short_request(number)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        if number % 100 == 99:
            connection.close()
            continue
        response = connection.getresponse()
        response.read()
        assert response.status == (400 if body.get("temperature") == -1 else 200)
    connection.close()


@pytest.mark.slow
def test_rss_is_flat_over_50_000_requests(serve, tiny_arguments):
    # A cache that the first thousands fill: its memory is taken when it is first written.
    with serve(*tiny_arguments, "--kv-cache-gib", "0.01") as server, ThreadPoolExecutor(CLIENTS) as pool:
        pids = {"server": server.process.pid, "engine": server.engine_pid}
        sizes = []
        for begin in range(0, ALL, STEP):
            list(
                pool.map(
                    lambda start: send(server, range(start, start + STEP // CLIENTS)),
                    range(begin, begin + STEP, STEP // CLIENTS),
                )
            )
            sizes.append({name: rss(pid) for name, pid in pids.items()})
            print(begin + STEP, {name: f"{size / 2**20:.1f} MiB" for name, size in sizes[-1].items()}, flush=True)
        assert server.engine_pid == pids["engine"]
    for name in pids:
        assert sizes[-1][name] <= sizes[0][name] * (1 + MOST_GROWTH), name
