"""The official `openai` client, unchanged, against a real server."""

from __future__ import annotations

import openai
import pytest

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-alias"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_chat(client, server):
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 5, "min_tokens": 2},
    )
    assert answer.choices[0].message.content == server.chat("hello").json()["choices"][0]["message"]["content"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer._request_id.startswith("req-")


def test_a_stream_adds_up(client, server):
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = server.chat("hello", max_tokens=20).json()
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1].usage.completion_tokens == whole["usage"]["completion_tokens"]
    assert chunks[0].choices[0].delta.role == "assistant"


def test_the_clients_own_accumulator_takes_the_stream(client, server):
    whole = server.chat("hello", max_tokens=12).json()["choices"][0]
    stop = whole["message"]["content"][3]  # the client takes a text that the length cut short for a failure
    whole = server.chat("hello", max_tokens=12, stop=stop).json()["choices"][0]
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, max_tokens=12, temperature=0, stop=stop
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole["message"]["content"]


def test_completions(client, server):
    answer = client.completions.create(model="tiny", prompt=["hello", "you"], max_tokens=4, temperature=0, logprobs=1)
    assert [choice.text for choice in answer.choices] == [
        server.complete(prompt, max_tokens=4).json()["choices"][0]["text"] for prompt in ("hello", "you")
    ]
    stream = client.completions.create(model="tiny", prompt="hello", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_errors_are_the_clients_own_types_with_a_body(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    assert "temperature must be" in bad.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert missing.value.code == "model_not_found"


def test_a_wrong_key(serving):
    with serving(api_keys=("right",)) as locked:
        with (
            openai.OpenAI(base_url=locked.url + "/v1", api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError) as refused,
        ):
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=locked.url + "/v1", api_key="right") as client:
            assert client.models.list().data


def test_an_error_inside_a_stream_is_raised(client, monkeypatch):
    from paceline.engine.output import Answer
    from paceline.errors import EngineError

    def fail(self, update):
        raise EngineError("NaN in the logits")

    monkeypatch.setattr(Answer, "apply", fail)
    with pytest.raises(openai.APIError, match="NaN in the logits"):
        list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, max_tokens=4))
