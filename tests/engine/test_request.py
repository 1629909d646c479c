from __future__ import annotations

import pytest

from paceline.engine.request import Request, RequestSpec
from paceline.sampling.params import SamplingParams

EOS = frozenset({2, 9})


def request(max_total_tokens=100, **params):
    made = Request(RequestSpec("a", (5, 6), SamplingParams(**params), eos_token_ids=EOS))
    made.max_total_tokens = max_total_tokens
    return made


@pytest.mark.parametrize(
    ("params", "new", "expected"),
    [
        ({}, [4, 4], (2, None, None)),
        ({}, [4, 9, 4], (2, "stop", None)),  # any id of a list-valued EOS; what follows is cut
        ({"ignore_eos": True}, [9, 2], (2, None, None)),
        ({"stop_token_ids": [7]}, [4, 7, 9], (2, "stop", 7)),
        ({"stop_token_ids": [9]}, [9], (1, "stop", None)),  # the model's own end wins over the user's
        ({"stop_token_ids": [9], "ignore_eos": True}, [9], (1, "stop", 9)),
        ({"min_tokens": 2}, [2, 2, 2, 4], (3, "stop", None)),
        ({"min_tokens": 1, "stop_token_ids": [7]}, [7, 7], (2, "stop", 7)),
    ],
)
def test_where_the_output_stops(params, new, expected):
    made = request(**params)
    assert made.append(new) == expected
    assert made.output_token_ids == new[: expected[0]]


def test_length_stops_after_the_stop_ids_had_their_say():
    assert request(max_total_tokens=4).append([3, 3, 3]) == (2, "length", None)
    assert request(max_total_tokens=4).append([3, 2, 3]) == (2, "stop", None)


def test_stop_ids_told_to_the_runner():
    assert request(stop_token_ids=[7]).announcement().stop_token_ids == {2, 7, 9}
    assert request(stop_token_ids=[7], ignore_eos=True).announcement().stop_token_ids == {7}


def test_uncomputed_tokens_count_placeholders():
    made = request()
    assert (made.num_tokens, made.num_output_tokens, made.num_uncomputed_tokens) == (2, 0, 2)
    made.num_computed_tokens, made.num_placeholders = 2, 1
    assert made.num_uncomputed_tokens == 1
    made.append([4])
    made.num_placeholders = 0
    assert (made.num_tokens, made.num_output_tokens, made.num_uncomputed_tokens) == (3, 1, 1)
