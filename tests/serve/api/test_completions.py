"""/v1/completions: text, ids, lists of both, echo, and the legacy log probabilities."""

from __future__ import annotations

import pytest

from paceline.llm import LLM
from paceline.sampling.params import SamplingParams


@pytest.fixture(scope="module")
def llm(tiny_chat_model):
    with LLM(str(tiny_chat_model), device="cpu", dtype="float32") as made:
        yield made


def texts(response):
    return [choice["text"] for choice in response.json()["choices"]]


def test_text_ids_and_lists_of_them_are_the_same_prompts(server, llm):
    prompts = ["hello", "you"]
    ids = [llm.get_tokenizer().encode(prompt) for prompt in prompts]
    expected = [output.outputs[0].text for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))]
    assert texts(server.complete(prompts)) == texts(server.complete(ids)) == expected
    assert texts(server.complete(prompts[0])) == texts(server.complete(ids[0])) == expected[:1]
    usage = server.complete(prompts).json()["usage"]
    assert usage["prompt_tokens"] == sum(map(len, ids))
    assert usage["completion_tokens"] == 16


def test_choices_are_numbered_through_prompts_and_answers(server):
    response = server.complete(["hello", "you"], n=3, temperature=1, seed=2, max_tokens=4)
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(6))
    alone = server.complete("you", n=3, temperature=1, seed=2, max_tokens=4)
    assert texts(response)[3:] == texts(alone)


def test_sixteen_tokens_unless_told(server):
    assert server.complete(max_tokens=None, ignore_eos=True).json()["usage"]["completion_tokens"] == 16


def test_echo_and_logprobs(server, llm):
    answer = server.complete("hello", echo=True, logprobs=2, max_tokens=3).json()
    params = SamplingParams(temperature=0, max_tokens=3, echo=True, logprobs=2)
    expected = llm.generate("hello", params)[0].outputs[0]
    choice = answer["choices"][0]
    assert choice["text"] == expected.text
    assert choice["text"].startswith("hello")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:5] == list("hello")
    assert logprobs["text_offset"][:5] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for index in range(1, 8):
        token_id = expected.token_ids[index]
        assert logprobs["token_logprobs"][index] == pytest.approx(expected.logprobs[index][token_id].logprob, abs=1e-5)
    assert answer["usage"]["completion_tokens"] == 3, "an echoed prompt is not an answer"


def test_a_prompt_can_be_scored_alone(server):
    """What lm-eval asks: echo, logprobs, and no token."""
    answer = server.complete("hello", echo=True, logprobs=1, max_tokens=0).json()
    choice = answer["choices"][0]
    assert choice["text"] == "hello"
    assert len(choice["logprobs"]["token_logprobs"]) == 5
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs(server):
    choice = server.complete("hello", prompt_logprobs=1, max_tokens=1).json()["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == 5
    assert all(1 <= len(entry) <= 2 for entry in choice["prompt_logprobs"][1:])


def test_best_of_returns_the_n_best_and_counts_all(server):
    answer = server.complete("hello", n=1, best_of=3, temperature=1, seed=1, max_tokens=5, ignore_eos=True).json()
    assert len(answer["choices"]) == 1
    assert answer["usage"]["completion_tokens"] == 15


def test_one_prompt_that_cannot_be_right_refuses_all(server):
    response = server.complete(["hello", "x" * 600])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert server.complete(["hello", ""]).status_code == 400
