"""Streams as OpenAI's clients expect them, and what becomes of one whose client has left."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from paceline.errors import QueueFullError

CHAT = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 30}
COMPLETION = {"prompt": "hello", "temperature": 0, "max_tokens": 30}


def test_role_first_finish_reason_last_then_done(server):
    *chunks, done = server.events("/v1/chat/completions", CHAT)
    assert done == "[DONE]"
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(set(choice["delta"]) == {"content"} and choice["delta"]["content"] for choice in middle)
    assert last["delta"] == {}
    assert last["finish_reason"] == "length"
    assert all(choice["finish_reason"] is None for choice in [first, *middle])
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 3, "temperature": 1, "seed": 4},
        {"n": 2, "use_beam_search": True},
        {"stop": ["%"]},
        {"stop": ["\ufffd"]},
    ],
)
def test_the_pieces_add_up_to_the_whole(server, extra):
    whole = server.post("/v1/chat/completions", {**CHAT, **extra}).json()
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in server.events("/v1/chat/completions", {**CHAT, **extra})[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}
    assert reasons == {choice["index"]: choice["finish_reason"] for choice in whole["choices"]}


def test_completions_add_up_too_with_several_prompts(server):
    body = {**COMPLETION, "prompt": ["hello", "you"], "n": 2, "temperature": 1, "seed": 3, "logprobs": 1, "echo": True}
    whole = server.post("/v1/completions", body).json()
    for choice in whole["choices"]:
        pieces = [
            piece
            for chunk in server.events("/v1/completions", body)[:-1]
            for piece in chunk["choices"]
            if piece["index"] == choice["index"]
        ]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            parts = [value for piece in pieces if piece["logprobs"] for value in piece["logprobs"][name]]
            assert parts == values, name


def test_logprobs_of_a_token_whose_text_is_held_back_are_sent(server):
    body = {**CHAT, "logprobs": True, "top_logprobs": 1}
    whole = server.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    parts = [
        entry
        for chunk in server.events("/v1/chat/completions", body)[:-1]
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert parts == whole


def test_usage_comes_once_at_the_end_if_asked_for(server):
    whole = server.post("/v1/chat/completions", CHAT).json()["usage"]
    *chunks, last, _ = server.events("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
    assert last["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][key] == whole[key]
    assert all(chunk["usage"] is None for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk["usage"]["completion_tokens"]
        for chunk in server.events("/v1/chat/completions", {**CHAT, "stream_options": options})[:-1]
    ]
    assert counts == sorted(counts)
    assert counts[-1] == whole["completion_tokens"]
    assert len(set(counts)) > 5


def test_a_bad_request_is_an_error_and_no_stream(server):
    response = server.post("/v1/chat/completions", {**CHAT, "stream": True, "temperature": -1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


def test_a_failure_after_the_start_is_an_event(server, monkeypatch):
    from paceline.engine.output import Answer
    from paceline.errors import EngineError

    apply = Answer.apply

    def fail_later(self, update):
        if len(self.token_ids) >= 3:
            raise EngineError("the logits of this request are not finite")
        return apply(self, update)

    monkeypatch.setattr(Answer, "apply", fail_later)
    *chunks, error, done = server.events("/v1/chat/completions", CHAT)
    assert done == "[DONE]"
    assert error["error"]["message"] == "the logits of this request are not finite"
    assert error["error"]["type"] == "server_error"
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    whole = server.post("/v1/chat/completions", CHAT)
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "engine_error")


@pytest.fixture(scope="module")
def slow(serving):
    """A server whose steps take 20 ms, so that there is something to leave."""
    import time

    from paceline.engine.engine import Engine

    step = Engine.step

    def slowly(self):
        time.sleep(0.02)
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", slowly)
        with serving() as running:
            yield running


LONG = {**CHAT, "max_tokens": 480, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_ends_its_request(slow, stream, path):
    body = {**LONG, "stream": stream} if "chat" in path else {"prompt": ["a", "b"], "max_tokens": 480, "stream": stream}
    data = json.dumps({**body, "ignore_eos": True}).encode()
    aborts = 'paceline_requests_finished_total{finish_reason="abort",model_name="tiny"} '
    before = float(slow.client.get("/metrics").text.split(aborts)[1].split("\n")[0])
    with socket.create_connection(("127.0.0.1", int(slow.url.rpartition(":")[2]))) as connection:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        connection.sendall(head.encode() + data)
        slow.wait_for(lambda: slow.service.client.status().running > 0)
    # 480 tokens of 20 ms would take 10 s.
    slow.wait_for(lambda: slow.service.client.status().running == 0, 2)
    slow.wait_for(lambda: slow.service.num_in_flight == 0, 1)
    assert slow.service.client.status().kv_usage == 0
    after = float(slow.client.get("/metrics").text.split(aborts)[1].split("\n")[0])
    assert after > before
    assert slow.chat(max_tokens=2).status_code == 200


def test_a_client_that_stops_reading_ends_when_it_leaves(slow):
    with httpx.stream("POST", slow.url + "/v1/chat/completions", json={**LONG, "stream": True}) as response:
        assert response.status_code == 200
        slow.wait_for(lambda: slow.service.client.status().running > 0)
    slow.wait_for(lambda: slow.service.client.status().running == 0, 2)


def test_tokens_come_as_they_are_made(slow):
    with httpx.stream("POST", slow.url + "/v1/chat/completions", json={**LONG, "stream": True}) as response:
        events = response.iter_lines()
        received = [next(events) for _ in range(9)]
        assert slow.service.client.status().running == 1, "the stream was sent at its end"
    assert sum(line.startswith("data: ") for line in received) >= 4
    slow.wait_for(lambda: slow.service.num_in_flight == 0, 2)


@pytest.mark.parametrize("stream", [True, False])
def test_when_one_of_several_prompts_is_refused_the_others_are_given_back(slow, monkeypatch, stream):
    submit = slow.service.client.submit
    taken = []

    async def second_is_refused(request):
        if taken:
            raise QueueFullError("full", 1)
        taken.append(request.request_id)
        return await submit(request)

    body = {"prompt": ["hello", "you"], "max_tokens": 480, "ignore_eos": True, "stream": stream}
    with monkeypatch.context() as patch:
        patch.setattr(slow.service.client, "submit", second_is_refused)
        response = slow.post("/v1/completions", body)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert len(taken) == 1
    # 480 tokens of 20 ms would take 10 s.
    slow.wait_for(lambda: slow.service.client.status().kv_usage == 0, 2)


def test_of_several_answers_the_engine_ends_the_one_that_met_its_stop_string(server):
    """A client could not tell: the engine's own count of tokens can."""
    body = {"prompt": "x", "n": 2, "temperature": 1, "seed": 3, "max_tokens": 200, "ignore_eos": True}
    first, second = (choice["text"] for choice in server.post("/v1/completions", body).json()["choices"])
    stop = next(character for character in first[:40] if character not in second)
    length = first.index(stop) + 1

    def made() -> int:
        return server.service.client.status().counters.generation_tokens

    before = made()
    answer = server.post("/v1/completions", {**body, "stop": stop}).json()
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    assert [choice["text"] for choice in answer["choices"]] == [first[: length - 1], second]
    server.wait_for(lambda: made() - before >= 200 + length)
    assert made() - before < 300
