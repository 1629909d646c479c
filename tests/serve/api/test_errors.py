"""Every refusal: OpenAI's nested object, the right status, and the field at fault."""

from __future__ import annotations

import pytest

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def error(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("server_error" if status >= 500 else body["error"]["type"])
    assert "\n" not in body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 10**9}, "n", "at most"),
        ({"n": 2, "temperature": 0}, "n", "temperature is 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 10**30}, "max_tokens", "less than"),
        ({"min_tokens": 3}, "min_tokens", "exceed max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty", "[-2, 2]"),
        ({"logit_bias": {"5": 1000}}, "logit_bias", "[-100, 100]"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "integer"),
        ({"stop_token_ids": [99999]}, "stop_token_ids", "vocabulary"),
        ({"stop": ""}, "stop", "empty string"),
        ({"stop": ["x"] * 65}, "stop", "at most 64"),
        ({"stop": "x" * 1025}, "stop", "1024 characters"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "--max-logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "from 0"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streamed"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "role"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "image_url"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "context holds 512"),
        ({"max_tokens": 5000}, "messages", "5000 more are asked for"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
        ({"best_of": 1, "n": 2, "temperature": 1}, "best_of", "at least n"),
    ],
)
def test_a_value_that_cannot_be_right_is_a_400_that_names_it(server, fields, param, says):
    found = error(server.post("/v1/chat/completions", {**CHAT, **fields}), 400)
    assert found["param"] == param
    assert says in found["message"]
    assert found["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"response_format": {"type": "json_object"}},
        {"guided_json": {"type": "object"}},
        {"structured_outputs": {"choice": ["a"]}},
        {"modalities": ["text", "audio"]},
        {"reasoning_effort": "low"},
        {"thinking_token_budget": 5},
        {"verbosity": "low"},
        {"web_search_options": {}},
        {"return_token_ids": True},
    ],
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused(server, fields):
    found = error(server.post("/v1/chat/completions", {**CHAT, **fields}), 400)
    assert found["param"] == next(iter(fields))
    assert found["code"] == "unsupported_parameter"


def test_a_suffix_is_refused(server):
    assert error(server.complete("hello", suffix="end"), 400)["param"] == "suffix"
    assert server.complete("hello", suffix="").status_code == 200


INERT = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}


def test_what_changes_nothing_is_accepted(server):
    plain = server.post("/v1/chat/completions", {**CHAT, "temperature": 0}).json()["choices"]
    assert server.post("/v1/chat/completions", {**CHAT, "temperature": 0, **INERT}).json()["choices"] == plain


def test_an_unknown_field_is_accepted_and_logged_once(server, caplog):
    for _ in range(2):
        assert server.post("/v1/chat/completions", {**CHAT, **INERT, "frobnicate_1": 1}).status_code == 200
    assert [record.getMessage() for record in caplog.records if "frobnicate_1" in record.getMessage()] == [
        "requests hold a field 'frobnicate_1', which is not known and changes nothing"
    ]
    assert not any("'user'" in record.getMessage() for record in caplog.records)


def test_the_model_must_be_one_that_is_served(server):
    assert server.chat(model="tiny-alias").json()["model"] == "tiny-alias"
    assert server.chat(model=None).json()["model"] == "tiny"
    found = error(server.chat(model="gpt-4"), 404)
    assert (found["param"], found["code"]) == ("model", "model_not_found")
    assert "tiny" in found["message"]
    error(server.client.get("/v1/models/gpt-4"), 404)


def test_paths_and_methods(server):
    assert error(server.client.get("/v2/none"), 404)["code"] == "not_found"
    assert error(server.client.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
    assert error(server.client.delete("/v1/models"), 405)["code"] == "method_not_allowed"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"])
def test_another_content_type_is_a_415(server, kind):
    response = server.client.post("/v1/chat/completions", content=b"{}", headers={"content-type": kind})
    assert kind in error(response, 415)["message"]


def test_a_content_type_with_parameters_or_none_is_json(server):
    import json

    data = json.dumps(CHAT).encode()
    for headers in ({"content-type": "application/json; charset=utf-8"}, {}):
        assert server.client.post("/v1/chat/completions", content=data, headers=headers).status_code == 200


def test_a_body_that_is_too_large_is_a_413_before_it_is_read(serving):
    with serving(max_body_bytes=1000) as small:
        assert error(small.chat("x" * 2000), 413)["code"] == "request_too_large"

        def pieces():  # no Content-Length: only reading tells
            for _ in range(100):
                yield b" " * 100

        headers = {"content-type": "application/json"}
        assert small.client.post("/v1/completions", content=pieces(), headers=headers).status_code == 413
        assert small.chat("hi").status_code == 200


def test_an_unexpected_exception_is_a_500_and_the_next_request_is_answered(server, monkeypatch, caplog):
    from paceline.serve.routes import generate

    def broken(*_):
        raise ZeroDivisionError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(generate, "new_id", broken)
        found = error(server.post("/v1/chat/completions", CHAT), 500)
    assert found["code"] == "internal_error"
    assert "secret" not in found["message"]
    assert any(record.exc_info for record in caplog.records), "the log has the traceback"
    assert server.post("/v1/chat/completions", CHAT).status_code == 200


def test_a_full_queue_is_a_429_with_a_time(server, monkeypatch):
    from paceline.errors import EngineDeadError, QueueFullError

    async def full(request):
        raise QueueFullError("512 requests wait already", 7.4)

    async def dead(request):
        raise EngineDeadError("the engine is being restarted")

    for body in (CHAT, {**CHAT, "stream": True}):
        monkeypatch.setattr(server.service.client, "submit", full)
        response = server.post("/v1/chat/completions", body)
        assert error(response, 429)["code"] == "queue_full"
        assert response.headers["retry-after"] == "7"
        monkeypatch.setattr(server.service.client, "submit", dead)
        response = server.post("/v1/chat/completions", body)
        assert error(response, 503)["code"] == "engine_unavailable"
        assert "retry-after" in response.headers
