"""/v1/chat/completions: the same answers as LLM gives, in OpenAI's form."""

from __future__ import annotations

import pytest

from paceline.llm import LLM
from paceline.sampling.params import SamplingParams

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def llm(tiny_chat_model):
    with LLM(str(tiny_chat_model), device="cpu", dtype="float32") as made:
        yield made


def test_the_answer_is_what_llm_gives(server, llm):
    body = {"messages": MESSAGES, "max_tokens": 20, "temperature": 0, "model": "tiny"}
    answer = server.post("/v1/chat/completions", body).json()
    expected = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=20))[0]
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected.outputs[0].text, "refusal": None}
    assert choice["finish_reason"] == expected.outputs[0].finish_reason
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(expected.prompt_token_ids)
    assert usage["completion_tokens"] == len(expected.outputs[0].token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_sampling_fields_of_openai_and_of_vllm_reach_the_engine(server, llm):
    fields = {
        "temperature": 0.9,
        "seed": 5,
        "top_p": 0.9,
        "top_k": 12,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "max_tokens": 24,
        "min_tokens": 24,
        "n": 2,
        "skip_special_tokens": False,
    }
    answer = server.post("/v1/chat/completions", {"messages": MESSAGES, **fields, "logit_bias": {"70": 3}}).json()
    expected = llm.chat(MESSAGES, SamplingParams(**fields, logit_bias={70: 3}))[0]
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [output.text for output in expected.outputs]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for name in ("temperature", "seed", "top_p", "top_k", "repetition_penalty", "presence_penalty", "min_tokens"):
        without = {key: value for key, value in fields.items() if key != name}
        other = server.post("/v1/chat/completions", {"messages": MESSAGES, **without}).json()
        assert [choice["message"]["content"] for choice in other["choices"]] != texts, f"{name} changes nothing"


def test_null_fields_are_not_given(server):
    nulls = dict.fromkeys(["temperature", "top_p", "n", "stop", "seed", "logprobs", "tools", "response_format"])
    plain = server.chat(seed=1, temperature=0)
    assert server.chat(**{**nulls, "seed": 1, "temperature": 0}).json()["choices"] == plain.json()["choices"]


def test_max_completion_tokens_is_max_tokens(server):
    body = {"messages": MESSAGES, "max_completion_tokens": 3, "temperature": 0}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_without_max_tokens_an_answer_may_fill_the_context(server):
    answer = server.chat(max_tokens=None, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 512


def test_logprobs(server, llm):
    answer = server.chat("hello", logprobs=True, top_logprobs=3, max_tokens=6).json()
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3)
    expected = llm.chat([{"role": "user", "content": "hello"}], params)[0].outputs[0]
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == len(expected.token_ids) == 6
    for entry, token_id, logprobs in zip(content, expected.token_ids, expected.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(logprobs[token_id].logprob, abs=1e-5)
        assert entry["token"] == logprobs[token_id].decoded_token
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"], "greedy: the likeliest is the chosen one"
    joined = b"".join(bytes(entry["bytes"]) for entry in content)
    assert joined.decode("utf-8", "replace") == answer["choices"][0]["message"]["content"]
    assert server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_stop_string_ends_the_answer_before_it(server):
    whole = server.chat(max_tokens=40).json()["choices"][0]["message"]["content"]
    stop = whole[10:13]
    answer = server.chat(max_tokens=40, stop=stop).json()["choices"][0]
    assert answer["message"]["content"] == whole[: whole.index(stop)]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", stop)
    kept = server.chat(max_tokens=40, stop=[stop], include_stop_str_in_output=True).json()["choices"][0]
    assert kept["message"]["content"] == whole[: whole.index(stop) + len(stop)]


def test_text_parts_and_the_developer_role(server):
    plain = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}).json()
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    parts = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0}).json()
    assert parts["choices"] == plain["choices"]
    assert parts["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def test_the_last_message_can_be_continued(server):
    messages = [*MESSAGES, {"role": "assistant", "content": "I a"}]
    body = {"messages": messages, "continue_final_message": True}
    tokens = server.post("/tokenize", body).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text == "s:be brief\nu:hello\na:I a"
    answer = server.post("/v1/chat/completions", {**body, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == len(tokens)


def test_template_variables_reach_the_template(serving, tiny_chat_model, server):
    template = "{{ mood }}:{{ messages[0]['content'] }}"
    body = {"messages": MESSAGES[1:], "chat_template": template, "chat_template_kwargs": {"mood": "glad"}}
    refused = server.post("/tokenize", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")
    with serving(trust_request_chat_template=True) as trusting:
        tokens = trusting.post("/tokenize", body).json()["tokens"]
        assert trusting.post("/detokenize", {"tokens": tokens}).json()["prompt"] == "glad:hello"


def test_beams_and_best_of(server, llm):
    fields = {"n": 2, "use_beam_search": True, "max_tokens": 6, "temperature": 0}
    answer = server.chat("hello", **fields).json()
    expected = llm.chat([{"role": "user", "content": "hello"}], SamplingParams(**fields))[0]
    assert [choice["message"]["content"] for choice in answer["choices"]] == [o.text for o in expected.outputs]


def test_the_shared_prefix_is_not_computed_again(server):
    text = "a long beginning that two requests share " * 5
    first, second = server.chat(text).json(), server.chat(text).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 150
    assert first["choices"] == second["choices"]
    salted = server.chat(text, cache_salt="another tenant").json()
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert salted["choices"] == first["choices"]
