"""Clients that others wrote, as they come, against `paceline serve` with the default model."""

from __future__ import annotations

import openai
import pytest

QUESTION = "What is the capital of France? Answer in one sentence."
MESSAGES = [{"role": "user", "content": QUESTION}]

pytestmark = pytest.mark.default_model


@pytest.fixture(scope="module")
def smollm2(serve, default_model_gguf):
    """The default model, as `paceline serve` without a model's name takes it; its one name is the default, too."""
    with serve("--max-model-len", "1024", "--dtype", "float32", "--device", "cpu") as server:
        yield server


@pytest.fixture(scope="module")
def answer(smollm2):
    """What the server says to the question, greedily."""
    text = smollm2.chat(QUESTION, max_tokens=24).json()["choices"][0]["message"]["content"]
    assert "Paris" in text
    return text


def test_openai(smollm2, answer):
    with openai.OpenAI(base_url=smollm2.url + "/v1", api_key="none", max_retries=0) as client:
        (model,) = client.models.list()
        asked = {"model": model.id, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == answer
        assert whole.usage.completion_tokens <= 24
        with client.chat.completions.create(**asked, stream=True) as stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.chat.completions.create(**{**asked, "model": "gpt-4o"})


@pytest.mark.slow
def test_litellm(smollm2, answer, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or its import asks GitHub for prices
    import litellm

    model = smollm2.client.get("/v1/models").json()["data"][0]["id"]
    asked = {
        "messages": MESSAGES,
        "max_tokens": 24,
        "temperature": 0,
        "api_base": smollm2.url + "/v1",
        "api_key": "none",
        "num_retries": 0,
    }
    for provider in ("openai", "hosted_vllm"):
        asked["model"] = f"{provider}/{model}"
        whole = litellm.completion(**asked)
        assert whole.choices[0].message.content == answer
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        chunks = list(litellm.completion(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
        with pytest.raises(litellm.BadRequestError, match="temperature"):
            litellm.completion(**{**asked, "temperature": -1})


@pytest.mark.slow
def test_langchain(smollm2, answer):
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    model = smollm2.client.get("/v1/models").json()["data"][0]["id"]
    chat = ChatOpenAI(base_url=smollm2.url + "/v1", api_key="none", model=model, temperature=0, max_tokens=24)
    whole = chat.invoke(QUESTION)
    assert whole.content == answer
    assert whole.usage_metadata["output_tokens"] <= 24
    assert "".join(chunk.content for chunk in chat.stream([HumanMessage(QUESTION)])) == answer
    both = chat.batch([[HumanMessage(QUESTION)], [SystemMessage("Answer in French."), HumanMessage(QUESTION)]])
    assert both[0].content == answer
    assert both[1].content
