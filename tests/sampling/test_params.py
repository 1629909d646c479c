"""Every wrong value is refused in one line that names the parameter; defaults come from where the user is told."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from paceline.errors import UsageError
from paceline.sampling.params import FIELD_NAMES, BeamSearchParams, SamplingParams, with_defaults

WRONG = [
    ("n", 0),
    ("n", True),
    ("n", 1.0),
    ("best_of", 0),
    ("best_of", 2.0),
    ("use_beam_search", 1),
    ("length_penalty", math.nan),
    ("length_penalty", 10.5),
    ("early_stopping", "always"),
    ("early_stopping", 1),
    ("early_stopping", True),  # nothing is searched
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", -0.1),
    ("temperature", "1"),
    ("temperature", False),
    ("temperature", None),
    ("top_k", -2),
    ("top_k", True),
    ("top_k", 1.5),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("typical_p", 0),
    ("typical_p", 1.01),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.01),
    ("presence_penalty", -2.01),
    ("frequency_penalty", 2.01),
    ("frequency_penalty", -2.01),
    ("logit_bias", {5: 100.5}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"5": 1.0}),
    ("logit_bias", [5]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [-1]),
    ("allowed_token_ids", "12"),
    ("bad_words", [""]),
    ("bad_words", [3]),
    ("seed", 2**64),
    ("seed", 1.0),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [3]),
    ("stop", 3),
    ("stop_token_ids", [True]),
    ("stop_token_ids", 3),
    ("include_stop_str_in_output", 1),
    ("ignore_eos", "yes"),
    ("logprobs", -2),
    ("logprobs", True),
    ("prompt_logprobs", -2),
    ("prompt_logprobs", 1.0),
    ("echo", 1),
    ("detokenize", 0),
    ("skip_special_tokens", None),
    ("spaces_between_special_tokens", 0),
    ("truncate_prompt_tokens", 0),
    ("priority", 0.5),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError) as refused:
        SamplingParams(**{name: value})
    message = str(refused.value)
    assert name in message
    assert "\n" not in message
    assert len(message) < 200


def test_every_field_has_a_wrong_value_above() -> None:
    assert {name for name, _ in WRONG} == set(FIELD_NAMES)


def test_the_ends_of_each_range_are_inside() -> None:
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=0, typical_p=1, presence_penalty=-2, frequency_penalty=2)
    SamplingParams(temperature=1e9, top_k=10**9, top_p=1e-9, min_p=1, typical_p=1e-9, presence_penalty=2)
    SamplingParams(logit_bias={0: -100, 1: 100}, seed=2**64 - 1, max_tokens=None, min_tokens=10**6, logprobs=-1)
    SamplingParams(seed=-(2**63), min_tokens=16, max_tokens=16)


def test_greedy_refuses_copies_and_stop_strings_need_text() -> None:
    with pytest.raises(UsageError, match="n must be 1 when temperature is 0"):
        SamplingParams(n=2, temperature=0.0)
    with pytest.raises(UsageError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


CONTRADICTIONS = [
    ({"temperature": 0.7}, "temperature"),
    ({"temperature": 1e-6}, "temperature"),
    ({"top_k": 5}, "top_k"),
    ({"top_p": 0.9}, "top_p"),
    ({"min_p": 0.1}, "min_p"),
    ({"typical_p": 0.9}, "typical_p"),
    ({"stop": "x"}, "stop_token_ids"),
    ({"n": 5}, "best_of"),
    ({"n": 1, "best_of": 1}, "temperature=0"),
    ({"n": 1, "best_of": None}, "at least 2 beams"),
    ({"max_tokens": 0, "echo": True}, "max_tokens 0"),
]


@pytest.mark.parametrize(("given", "named"), CONTRADICTIONS)
def test_beams_refuse_what_contradicts_them(given: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named) as refused:
        SamplingParams(**{"use_beam_search": True, "n": 2, "best_of": 4, **given})
    assert len(str(refused.value)) < 200


def test_beams_go_with_what_changes_no_ranking_of_their_own() -> None:
    for given in ({"temperature": 0}, {"temperature": 1}, {"top_k": -1}, {"repetition_penalty": 2.0}, {"seed": 1}):
        params = SamplingParams(use_beam_search=True, n=3, early_stopping="never", length_penalty=-2, **given)
        assert (params.width, params.num_answers, params.is_ranked) == (3, 3, True)


def test_ranks_need_answers_to_rank() -> None:
    with pytest.raises(UsageError, match="length_penalty ranks answers and none are ranked here"):
        SamplingParams(n=2, best_of=2, length_penalty=0)
    with pytest.raises(UsageError, match=r"best_of \(2\) must be at least n \(3\)"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(UsageError, match="best_of must be 1 when temperature is 0"):
        SamplingParams(best_of=2, temperature=0)
    with pytest.raises(UsageError, match="max_tokens 0 makes no answers to rank"):
        SamplingParams(best_of=2, max_tokens=0, echo=True)
    params = SamplingParams(n=2, best_of=5, length_penalty=0)
    assert (params.width, params.num_answers, params.is_ranked, params.num_logprobs) == (5, 5, True, 0)
    assert not SamplingParams(n=2, best_of=2).is_ranked
    assert SamplingParams(n=2).num_logprobs is None
    assert SamplingParams(best_of=2, logprobs=3).num_logprobs == 3


def test_beam_search_params_are_vllms() -> None:
    given = BeamSearchParams(beam_width=4, max_tokens=9, ignore_eos=True, length_penalty=0.5)
    assert given.sampling_params() == SamplingParams(
        n=4, use_beam_search=True, max_tokens=9, ignore_eos=True, temperature=0.0, length_penalty=0.5
    )
    with pytest.raises(UsageError, match="beam_width must be an integer of at least 2"):
        BeamSearchParams(beam_width=1, max_tokens=9).sampling_params()
    with pytest.raises(UsageError, match="temperature"):
        BeamSearchParams(beam_width=2, max_tokens=9, temperature=0.5).sampling_params()


def test_nothing_is_generated_only_where_the_prompt_is_wanted() -> None:
    for wanted in ({"prompt_logprobs": 0}, {"echo": True}):
        assert SamplingParams(max_tokens=0, **wanted).max_tokens == 0
    with pytest.raises(UsageError, match="only a request with prompt_logprobs or echo may generate nothing"):
        SamplingParams(max_tokens=0, logprobs=1)


def test_echo_wants_the_prompts_log_probabilities_as_it_wants_the_answers() -> None:
    assert SamplingParams(logprobs=3).num_prompt_logprobs is None
    assert SamplingParams(echo=True).num_prompt_logprobs is None
    assert SamplingParams(echo=True, logprobs=3).num_prompt_logprobs == 3
    assert SamplingParams(echo=True, logprobs=3, prompt_logprobs=0).num_prompt_logprobs == 0
    assert SamplingParams(prompt_logprobs=-1).num_prompt_logprobs == -1


def test_a_long_wrong_value_gives_a_short_line() -> None:
    with pytest.raises(UsageError) as refused:
        SamplingParams(temperature="9\n" * 10_000)  # type: ignore[arg-type]
    assert len(str(refused.value)) < 200
    assert "\n" not in str(refused.value)


def test_sequences_become_tuples_that_the_caller_cannot_change() -> None:
    stop, ids, bias = ["a"], [1, 2], {3: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, allowed_token_ids=ids, logit_bias=bias, bad_words="no")
    stop.append("b")
    ids.append(9)
    bias[4] = 2.0
    assert params.stop == ("a",)
    assert params.stop_token_ids == params.allowed_token_ids == (1, 2)
    assert params.logit_bias == {3: 1.0}
    assert params.bad_words == ("no",)


def test_numpy_numbers_become_plain_ones() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3))  # type: ignore[arg-type]
    assert type(params.temperature) is float
    assert type(params.top_k) is int


def test_from_dict_refuses_unknown_keys_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'temperature'"):
        SamplingParams.from_dict({"temprature": 0.5})


def test_from_dict_reads_the_string_keys_of_json() -> None:
    assert SamplingParams.from_dict({"logit_bias": {"50256": -100}}).logit_bias == {50256: -100.0}
    with pytest.raises(UsageError, match="logit_bias"):
        SamplingParams.from_dict({"logit_bias": {"-1": 1}})


@pytest.mark.parametrize("given", [{"logit_bias": {10: 1.0}}, {"allowed_token_ids": [2, 10]}, {"stop_token_ids": [10]}])
def test_ids_past_the_vocabulary_are_refused(given: dict[str, object]) -> None:
    params = SamplingParams.from_dict(given)
    params.check_vocabulary(11)
    with pytest.raises(UsageError, match=f"{next(iter(given))} holds token id 10, but the vocabulary ends at 9"):
        params.check_vocabulary(10)


MODEL = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 99, "eos_token_id": [1, 2], "min_p": None}


def test_the_models_defaults_apply_where_the_user_said_nothing() -> None:
    params, taken = with_defaults(None, MODEL)
    assert params == SamplingParams(temperature=0.6, top_k=20, top_p=0.95, max_tokens=99)
    assert sorted(taken) == ["max_tokens", "temperature", "top_k", "top_p"]

    params, taken = with_defaults({"temperature": 1.0, "max_tokens": None, "seed": 4}, MODEL)
    assert params == SamplingParams(temperature=1.0, top_k=20, top_p=0.95, max_tokens=None, seed=4)
    assert sorted(taken) == ["top_k", "top_p"]


def test_beams_leave_the_models_sampling_defaults_aside() -> None:
    params, taken = with_defaults({"use_beam_search": True, "n": 2}, {**MODEL, "repetition_penalty": 1.3})
    assert params == SamplingParams(use_beam_search=True, n=2, max_tokens=99, repetition_penalty=1.3)
    assert sorted(taken) == ["max_tokens", "repetition_penalty"]


def test_a_params_object_is_used_as_it_stands() -> None:
    params = SamplingParams()
    assert with_defaults(params, MODEL) == (params, [])


def test_do_sample_false_means_greedy_only_when_written() -> None:
    assert with_defaults(None, {"do_sample": False, "temperature": 0.7})[0].greedy
    assert not with_defaults(None, {"temperature": 0.7})[0].greedy
    assert with_defaults({"temperature": 0.7}, {"do_sample": False})[0].temperature == 0.7


def test_a_wrong_generation_config_is_named() -> None:
    with pytest.raises(UsageError, match=r"generation_config.json is wrong: temperature"):
        with_defaults(None, {"temperature": -1})


def test_params_need_no_torch() -> None:
    code = "import sys, paceline.sampling.params, paceline.sampling.logprobs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
