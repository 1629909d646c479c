"""Whatever is sent: never a 5xx, and a normal answer after each."""

from __future__ import annotations

import json
import socket

import pytest

DEEP = 100_000
CHAT_PATH, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}
BODIES = {
    "empty": b"",
    "no JSON": b"hello",
    "cut short": b'{"messages": [{"role": "user"',
    "an array": b"[]",
    "null": b"null",
    "a number": b"5",
    "a string": b'"messages"',
    "two values": b"{}{}",
    "NaN": b'{"temperature": NaN, "messages": [], "prompt": "a"}',
    "infinity": b'{"temperature": Infinity, "prompt": "a"}',
    "a number beyond a double": b'{"temperature": 1e999, "prompt": "a"}',
    "a huge integer": b'{"max_tokens": ' + b"9" * 5000 + b', "prompt": "a"}',
    "deep arrays": b'{"messages": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep in a field that nobody reads": b'{"prompt": "a", "x": ' + b"[" * 400 + b"]" * 400 + b"}",
    "deep template variables": b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": '
    + b"[" * 900
    + b"]" * 900
    + b"}}",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "a lone surrogate": b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "a surrogate as a key": b'{"\\udfff": 1, "prompt": "a"}',
    "null bytes": b'{"prompt": "a\\u0000b", "messages": [{"role": "user", "content": "\\u0000"}], "max_tokens": 2}',
    "raw null bytes": b'{"prompt": "a\x00b"}',
    "duplicate keys": b'{"prompt": "a", "prompt": "b", "max_tokens": 2}',
    "a million spaces": b" " * 1_000_000,
}
FIELDS = {
    "a long text": {"prompt": "x" * 1_000_000, "messages": [{"role": "user", "content": "x" * 1_000_000}]},
    "a long text of one word per line": {"prompt": "ab\n" * 300_000},
    "many ids": {"prompt": [5] * 200_000},
    "many prompts": {"prompt": ["a"] * 50_000},
    "many messages": {"messages": [{"role": "user", "content": "a"}] * 20_000},
    "absurd n": {"n": 2**62, "temperature": 1},
    "absurd best_of": {"best_of": 10**9, "temperature": 1},
    "absurd max_tokens": {"max_tokens": 2**63 - 1},
    "absurd min_tokens": {"min_tokens": 2**63 - 1},
    "negative max_tokens": {"max_tokens": -1},
    "absurd truncation": {"truncate_prompt_tokens": 2**63},
    "absurd top_k": {"top_k": 2**63},
    "tiny temperature": {"temperature": 5e-324},
    "huge temperature": {"temperature": 1e308},
    "tiny top_p": {"top_p": 5e-324, "temperature": 1},
    "huge penalty": {"repetition_penalty": 1e308},
    "tiny penalty": {"repetition_penalty": 5e-324},
    "a huge bias": {"logit_bias": {"5": 10**400}},
    "a bias of everything": {"logit_bias": {str(i): -100 for i in range(259)}},
    "a bias by odd names": {"logit_bias": {"٣": 1}},
    "a bias by a signed name": {"logit_bias": {"-1": 1}},
    "nothing allowed": {"allowed_token_ids": []},
    "one allowed": {"allowed_token_ids": [2], "ignore_eos": True},
    "negative ids": {"prompt": [-1], "stop_token_ids": [-1]},
    "ids that are booleans": {"prompt": [True, False]},
    "mixed prompt": {"prompt": ["a", 1, [2]]},
    "nested prompts": {"prompt": [[[1]]]},
    "an empty prompt": {"prompt": []},
    "empty prompts": {"prompt": [[]]},
    "every bad word": {"bad_words": [chr(i) for i in range(32, 127)]},
    "odd bad words": {"bad_words": ["", " ", "\x00"]},
    "many stops": {"stop": ["a"] * 100_000},
    "an odd role": {"messages": [{"role": "\x00", "content": "x"}]},
    "a role of a kind": {"messages": [{"role": {"a": 1}, "content": "x"}]},
    "content of a kind": {"messages": [{"role": "user", "content": {"a": 1}}]},
    "template variables": {"chat_template_kwargs": {"range": 5, "self": 1, "loop": 2}},
    "template variables that hide options": {"chat_template_kwargs": {"template": "x", "add_generation_prompt": 1}},
    "template variables named like arguments": {"chat_template_kwargs": {"self": 1, "variables": {}, "": 2}},
    "a template": {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    "a model of a kind": {"model": 5},
    "a model name that goes up": {"model": "../../etc/passwd"},
    "a long model name": {"model": "x" * 1_000_000},
    "a long unknown field": {"y" * 100_000: 1},
    "a surrogate in a field's value": {"user": "\ud800"},
    "a long salt": {"cache_salt": "s" * 1_000_000},
    "priority": {"priority": -(2**63)},
    "stream of a kind": {"stream": 5},
    "stream options of a kind": {"stream": True, "stream_options": 5},
    "logprobs of a kind": {"logprobs": "all"},
    "many logprobs": {"logprobs": 2**40},
    "beams": {"use_beam_search": True, "n": 1000},
}
HEADERS = [
    {"content-type": "application/json; charset=utf-16"},
    {"authorization": "Bearer \xff"},
    {"x-request-id": "a" * 10_000},
    {"content-length": "-5"},
    {"accept": "\x80"},
    {"host": ""},
]


def check(response):
    assert response.status_code < 500, response.text[:500]
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert len(response.text) < 20_000


def cases(names, usual, others):
    """Each name at its usual path, and at the others in the slow run: what reads them is the same."""
    usually = [pytest.param(name, usual(name), id=name) for name in names]
    elsewhere = [(name, path) for name in names for path in others if path != usual(name)]
    return usually + [pytest.param(*one, id=" ".join(one), marks=pytest.mark.slow) for one in elsewhere]


@pytest.mark.parametrize(
    ("name", "path"), cases(BODIES, lambda _: CHAT_PATH, [COMPLETIONS, "/tokenize", "/detokenize"])
)
def test_bodies(server, name, path):
    check(server.client.post(path, content=BODIES[name], headers={"content-type": "application/json"}))


def usual_path(name):
    return COMPLETIONS if "prompt" in FIELDS[name] else CHAT_PATH


@pytest.mark.parametrize(("name", "path"), cases(FIELDS, usual_path, [CHAT_PATH, COMPLETIONS]))
def test_fields(server, name, path):
    body = {**CHAT, "prompt": "hi", **FIELDS[name]}
    if "messages" in FIELDS[name] and "prompt" not in FIELDS[name] and path == COMPLETIONS:
        del body["messages"]
    data = json.dumps(body).encode()
    check(server.client.post(path, content=data, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("headers", HEADERS, ids=lambda headers: next(iter(headers)))
def test_headers(server, headers):
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    raw(server, f"POST /v1/completions HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 1000,
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /%ff%00%2e%2e/ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",  # and then it leaves
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/9.9\r\nhost: x\r\n\r\n",
        b"BREW /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=range(10),
)
def test_what_is_no_request(server, data):
    raw(server, data)


def raw(server, data):
    """Send bytes, read what comes, leave."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        try:
            answer = connection.recv(65536)
        except ConnectionResetError:
            answer = b""
    assert b" 50" not in answer.split(b"\r\n")[0], answer[:200]
