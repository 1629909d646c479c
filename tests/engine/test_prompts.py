from __future__ import annotations

import pytest

from paceline.engine.prompts import TokenPrompt, check_prompt, read_prompt
from paceline.errors import PromptTooLongError, UsageError
from paceline.sampling.params import SamplingParams

PARAMS = SamplingParams()


def check(ids: tuple[int, ...], params: SamplingParams = PARAMS) -> TokenPrompt:
    return check_prompt(TokenPrompt(None, ids), params, vocab_size=100, max_model_len=8)


@pytest.mark.parametrize("prompt", [[1, 2], (1, 2), {"prompt_token_ids": [1, 2]}])
def test_token_ids_in_every_form(prompt):
    assert read_prompt(prompt, None).token_ids == (1, 2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("text", "no tokenizer"),
        ({"promt": "x"}, "did you mean 'prompt'"),
        ({}, "needs 'prompt'"),
        (7, "got int"),
        ([1, "2"], "must be integers, got '2'"),
        ([True], "must be integers, got True"),
        (b"bytes", "got bytes"),
    ],
)
def test_what_is_no_prompt_is_named(prompt, message):
    with pytest.raises(UsageError, match=message):
        read_prompt(prompt, None)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UsageError, match="empty"):
        check(())


@pytest.mark.parametrize("token", [-1, 100])
def test_a_token_outside_the_vocabulary_is_named(token):
    with pytest.raises(UsageError, match=f"{token} is outside the vocabulary, which ends at 99"):
        check((1, token))


def test_a_long_prompt_is_refused_with_both_lengths():
    assert check(tuple(range(7))).token_ids == tuple(range(7))
    with pytest.raises(PromptTooLongError, match="has 8 tokens and the context holds 8"):
        check(tuple(range(8)))


def test_a_prompt_is_cut_only_when_asked():
    assert check(tuple(range(20)), SamplingParams(truncate_prompt_tokens=3)).token_ids == (17, 18, 19)
