"""Many at once: the same answers as alone, and a full queue that refuses cleanly."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def mixed_requests(count):
    """Greedy ones of every kind: long and short, whole and streamed, with what reads the past and what branches."""
    extras = [
        {},
        {"best_of": 2, "use_beam_search": True},
        {"logprobs": 3, "echo": True},
        {"stop": ["e", "]"]},
        {"use_beam_search": True, "n": 2},
        {"repetition_penalty": 1.5, "presence_penalty": 1.0},
        {"min_tokens": 4, "stop_token_ids": list(range(3, 60))},
        {"prompt": [[7, 8, 9], list(range(3, 43))]},
    ]
    for number in range(count):
        body = {"max_tokens": 4 + 13 * number % 24, "temperature": 0, "stream": number % 3 == 0}
        text = "the same beginning of a prompt, " * (number % 4) + str(number)
        if number % 2:
            yield CHAT, {**body, "messages": [{"role": "user", "content": text}]}
        else:
            yield COMPLETION, {**body, "prompt": text, **extras[number // 2 % len(extras)]}


def post(server, path, body):
    """On a connection of its own; status, headers and text."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


def what_is_said(server, path, body):
    """An answer's choices, whichever chunks they came in; no log probability, whose last digits a batch may change."""
    status, _, text = post(server, path, body)
    assert status == 200, text
    chunks = [text]
    if body["stream"]:
        assert text.endswith("data: [DONE]\n\n")
        chunks = [line[6:] for line in text.split("\n\n")[:-2]]
    said = {}
    for choice in (choice for chunk in chunks for choice in json.loads(chunk)["choices"]):
        message = choice.get("message") or choice.get("delta") or {}
        one = said.setdefault(choice["index"], ["", None, []])
        one[0] += choice.get("text") or message.get("content") or ""
        one[1] = choice["finish_reason"] or one[1]
        one[2] += (choice["logprobs"] or {}).get("tokens", [])
    return said


def test_64_at_once_say_what_they_say_alone(server):
    requests = list(mixed_requests(64))
    alone = [what_is_said(server, path, body) for path, body in requests]
    assert all(alone)
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda request: what_is_said(server, *request), requests))
    assert together == alone


def test_512_at_once_are_each_served_or_told_when_to_ask_again(server):
    """16 run and 64 may wait: the rest gets 429 and, asking again as told, is served too."""
    body = {"prompt": "hello", "max_tokens": 16, "temperature": 0, "stream": False}
    expected = what_is_said(server, COMPLETION, body)

    def ask(_):
        refusals = 0
        while True:
            status, headers, text = post(server, COMPLETION, body)
            if status == 200:
                assert json.loads(text)["choices"][0]["text"] == expected[0][0]
                return refusals
            assert status == 429, text
            assert json.loads(text)["error"]["type"] == "rate_limit_error"
            refusals += 1
            time.sleep(int(headers["retry-after"]))

    with ThreadPoolExecutor(512) as pool:
        refusals = list(pool.map(ask, range(512)))
    assert refusals.count(0) >= 16 + 64
    assert sum(refusals) > 0
