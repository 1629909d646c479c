"""Any request whatever: refused with a 400, or answered, and its stream adds up to what is answered at once."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PRINTABLE = "".join(map(chr, range(32, 127)))
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SHORT = st.text(PRINTABLE, min_size=1, max_size=2)  # likely to stand in an answer of random bytes
IDS = st.lists(st.integers(0, 258), max_size=12)
FIELDS = {
    "min_tokens": st.integers(0, 6),
    "n": st.integers(1, 3),
    "best_of": st.integers(1, 4),
    "use_beam_search": st.booleans(),
    "length_penalty": st.floats(-2, 2),
    "temperature": st.sampled_from([0, 0.5, 1.0, 2.0]),
    "top_k": st.sampled_from([-1, 0, 1, 5, 300]),
    "top_p": st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.1, 1.0]),
    "typical_p": st.sampled_from([0.5, 1.0]),
    "presence_penalty": st.floats(-2.5, 2.5),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    "logit_bias": st.dictionaries(st.integers(0, 260).map(str), st.floats(-101, 101), max_size=3),
    "allowed_token_ids": IDS,
    "bad_words": st.lists(SHORT, max_size=3),
    "stop": SHORT | st.lists(SHORT, max_size=4),
    "stop_token_ids": IDS,
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "spaces_between_special_tokens": st.booleans(),
    "truncate_prompt_tokens": st.integers(-1, 20),
    "priority": st.integers(-3, 3),
    "echo": st.booleans(),
    "cache_salt": TEXT,
    "user": TEXT,
}
PATHS = {
    "/v1/completions": (
        {"prompt": TEXT | st.lists(TEXT, max_size=2) | IDS | st.lists(IDS, max_size=2)},
        {"logprobs": st.integers(0, 5)},
    ),
    "/v1/chat/completions": (
        {
            "messages": st.lists(
                st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}),
                max_size=3,
            )
        },
        {"logprobs": st.booleans(), "top_logprobs": st.integers(0, 5), "max_completion_tokens": st.integers(0, 24)},
    ),
}


@st.composite
def bodies(draw: st.DrawFn, path: str) -> dict[str, object]:
    """The path's own fields, and a few of the others: with all at once hardly any would be accepted."""
    required, own = PATHS[path]
    required = {**required, "seed": st.just(7), "max_tokens": st.integers(0, 24)}
    optional = {**FIELDS, **own}
    names = draw(st.lists(st.sampled_from(sorted(optional)), max_size=5, unique=True))
    return draw(st.fixed_dictionaries({**required, **{name: optional[name] for name in names}}))


def by_index(choices, text_of):
    """index -> text, finish_reason and stop_reason, pieces put together."""
    found = defaultdict(lambda: ["", None, None])
    for choice in choices:
        one = found[choice["index"]]
        assert one[1] is None, "something comes after the end"
        one[0] += text_of(choice)
        one[1], one[2] = choice["finish_reason"], choice.get("stop_reason")
    return dict(found)


def check_request(server, path, body):
    whole = server.client.post(path, json=body)
    streamed = server.client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert whole.status_code == streamed.status_code, (whole.text, streamed.text)
    if whole.status_code != 200:
        assert whole.status_code == 400, whole.text
        assert whole.json() == streamed.json()
        return
    answer, *events = whole.json(), *streamed.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "error" not in chunks[-1], chunks[-1]
    pieces = [choice for chunk in chunks for choice in chunk["choices"]]
    if path == "/v1/completions":
        assert by_index(pieces, lambda c: c["text"]) == by_index(answer["choices"], lambda c: c["text"])
    else:
        assert by_index(pieces, lambda c: c["delta"].get("content", "")) == by_index(
            answer["choices"], lambda c: c["message"]["content"]
        )
    cached = [usage.pop("prompt_tokens_details") for usage in (chunks[-1]["usage"], answer["usage"])]
    assert chunks[-1]["usage"] == answer["usage"], cached


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "examples", [pytest.param(60, id="short"), pytest.param(2000, id="long", marks=pytest.mark.slow)]
)
def test_a_stream_adds_up_to_the_answer(server, path, examples):
    @settings(
        max_examples=examples,
        derandomize=examples < 1000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(path))
    def check(body):
        check_request(server, path, body)

    check()
