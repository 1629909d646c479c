"""What beams choose among: the best tokens of each row, by log probabilities with masks and penalties upon them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.sampling.candidates import find_candidates
from paceline.sampling.logprobs import Candidates, num_candidates
from paceline.sampling.params import SamplingParams
from paceline.sampling.sampler import SamplingRow

V = 20


def row(output: tuple[int, ...] = (), stops: tuple[int, ...] = (), width: int = 2, **params: Any) -> SamplingRow:
    made = SamplingParams(use_beam_search=True, n=width, **params)
    return SamplingRow(made, 0, 3 + len(output), (4, 5, 5), output, frozenset(stops))


@pytest.fixture(name="logits_RV")
def make_logits() -> torch.Tensor:
    return torch.randn(3, V, generator=torch.Generator().manual_seed(5)) * 2


def test_the_best_come_first_and_enough_of_them(logits_RV):
    found = find_candidates(logits_RV, [row(), row(stops=(1, 2), width=3), row(width=15)])
    assert [len(one.token_ids) for one in found] == [4, 9, V]  # never more than the vocabulary has
    for logits_V, one in zip(logits_RV, found, strict=True):
        logprobs_V = logits_V.log_softmax(0)
        assert list(one.token_ids) == logprobs_V.argsort(descending=True)[: len(one.token_ids)].tolist()
        torch.testing.assert_close(torch.tensor(one.logprobs), logprobs_V[list(one.token_ids)])
        assert one.raw_logprobs == one.logprobs
        assert one.entries == ()


def test_a_row_does_not_depend_on_its_neighbours(logits_RV):
    rows = [row(), row(width=3, repetition_penalty=1.7), row(stops=(3,), min_tokens=2)]
    alone = [find_candidates(logits_RV[r : r + 1], [one])[0] for r, one in enumerate(rows)]
    assert find_candidates(logits_RV, rows) == alone


def test_a_repetition_penalty_multiplies_log_probabilities(logits_RV):
    """As transformers applies it in beam search: not to logits, and without normalising again."""
    (one,) = find_candidates(logits_RV[:1], [row(output=(7,), repetition_penalty=1.5, width=10)])
    raw_V = logits_RV[0].log_softmax(0)
    seen = (4, 5, 7)
    for token, value, raw in zip(one.token_ids, one.logprobs, one.raw_logprobs, strict=True):
        assert raw == pytest.approx(float(raw_V[token]))
        assert value == pytest.approx(raw * 1.5 if token in seen else raw)


def test_forbidden_tokens_are_left_out(logits_RV):
    best = int(logits_RV[0].argmax())
    (before,) = find_candidates(logits_RV[:1], [row(stops=(best,), min_tokens=1)])
    (after,) = find_candidates(logits_RV[:1], [row(output=(9,), stops=(best,), min_tokens=1)])
    assert best not in before.token_ids
    assert after.token_ids[0] == best
    (few,) = find_candidates(logits_RV[:1], [row(allowed_token_ids=[3, 6])])
    assert sorted(few.token_ids) == [3, 6]


def test_each_candidate_says_what_a_user_asked_for(logits_RV):
    (one,) = find_candidates(logits_RV[:1], [row(output=(7,), repetition_penalty=2.0, logprobs=3)])
    logprobs_V = logits_RV[0].log_softmax(0)
    ranking = logprobs_V.argsort(descending=True).tolist()
    for token, entry in zip(one.token_ids, one.entries, strict=True):
        assert (entry.token_id, entry.rank) == (token, ranking.index(token) + 1)
        assert entry.logprob == pytest.approx(float(logprobs_V[token]))
        assert list(entry.top) == ranking[:3]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_alone(logits_RV, wrong):
    logits_RV[1, 4] = wrong
    first, second, third = find_candidates(logits_RV, [row()] * 3)
    assert "not finite" in second
    assert isinstance(first, Candidates)
    assert isinstance(third, Candidates)


def test_enough_go_on_even_if_every_stop_token_ranks_first():
    assert [num_candidates(4, stops) for stops in (0, 1, 2)] == [8, 8, 12]
