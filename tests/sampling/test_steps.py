"""Each step against a plain per-row twin written from its definition, and against transformers' where it has one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from paceline.sampling import steps

R, V = 6, 700  # V > FIRST_WIDTH, so that filters do widen


@pytest.fixture(name="logits_RV", params=[0.3, 3.0], ids=["flat", "peaked"])
def make_logits(request: pytest.FixtureRequest) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(R, V, generator=generator) * request.param


def pairs(groups: dict[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    flat = [(row, token) for row, tokens in groups.items() for token in tokens]
    return torch.tensor([row for row, _ in flat]), torch.tensor([token for _, token in flat])


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def kept(filtered: torch.Tensor) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in filtered.numpy()]


def assert_filtered(filtered: torch.Tensor, logits: torch.Tensor, expected: list[set[int]]) -> None:
    """Exactly the expected tokens are left, with their logits unchanged."""
    assert kept(filtered) == expected
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


# ------------------------------------------------------------------------------------------- single tokens


def test_allow_only(logits_RV: torch.Tensor) -> None:
    expected = torch.full_like(logits_RV, -torch.inf)
    expected[0], expected[2:] = logits_RV[0], logits_RV[2:]
    expected[1, [3, 650]] = logits_RV[1, [3, 650]]
    steps.allow_only_(logits_RV, *pairs({1: [3, 650, 3]}))
    assert torch.equal(logits_RV, expected)


def test_forbid(logits_RV: torch.Tensor) -> None:
    before = logits_RV.clone()
    steps.forbid_(logits_RV, *pairs({0: [5], 4: [1, 2]}))
    changed = (logits_RV != before).nonzero().tolist()
    assert changed == [[0, 5], [4, 1], [4, 2]]
    assert bool((logits_RV[logits_RV != before] == -torch.inf).all())


def test_add_bias(logits_RV: torch.Tensor) -> None:
    before = logits_RV.clone()
    steps.add_bias_(logits_RV, *pairs({2: [7, 8], 3: [7]}), torch.tensor([1.5, -2.0, 100.0]))
    before[2, 7] += 1.5
    before[2, 8] -= 2.0
    before[3, 7] += 100.0
    assert torch.equal(logits_RV, before)


def test_repetition_penalty_is_transformers(logits_RV: torch.Tensor) -> None:
    seen = [[1, 2, 3, 2, 2], [699, 0, 0, 5, 4]]
    expected = logits_RV.clone()
    for row, penalty in ((1, 1.3), (4, 0.7)):
        ids = torch.tensor([seen[row == 4]])
        expected[row] = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits_RV[row : row + 1])[0]
    steps.penalize_repetition_(logits_RV, *pairs({1: seen[0], 4: seen[1]}), [1, 1.3, 1, 1, 0.7, 1])
    torch.testing.assert_close(logits_RV, expected, rtol=1e-6, atol=0)


def test_frequency_and_presence(logits_RV: torch.Tensor) -> None:
    outputs = {0: [4, 4, 4, 9], 5: [4, 0, 699, 0]}
    frequency, presence = [0.5, 0, 0, 0, 0, -1.5], [0.25, 0, 0, 0, 0, 2.0]
    expected = logits_RV.clone()
    for row, output in outputs.items():
        for token, count in Counter(output).items():
            expected[row, token] -= count * frequency[row] + presence[row]
    steps.penalize_frequency_and_presence_(logits_RV, *pairs(outputs), frequency, presence)
    torch.testing.assert_close(logits_RV, expected, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------- filters


def test_temperature_is_transformers(logits_RV: torch.Tensor) -> None:
    temperatures = [0.1, 0.5, 1.0, 1.5, 2.0, 7.0]
    result = steps.apply_temperature(logits_RV, temperatures)
    for row, temperature in enumerate(temperatures):
        expected = hf.TemperatureLogitsWarper(temperature)(None, logits_RV[row : row + 1])
        torch.testing.assert_close(result[row : row + 1], expected, rtol=1e-6, atol=0)


FILTERS = [
    (steps.filter_top_k, hf.TopKLogitsWarper, [1, 2, 50, 300, 699, 10**6]),
    (steps.filter_top_p, hf.TopPLogitsWarper, [1e-9, 0.1, 0.5, 0.9, 0.99, 0.9999]),
    (steps.filter_min_p, hf.MinPLogitsWarper, [1e-9, 0.01, 0.1, 0.5, 0.9, 1.0]),
    (steps.filter_typical_p, hf.TypicalLogitsWarper, [1e-9, 0.1, 0.2, 0.5, 0.9, 0.99]),
]


@pytest.mark.parametrize(("own", "theirs", "values"), FILTERS, ids=["top_k", "top_p", "min_p", "typical_p"])
def test_filters_are_transformers(own, theirs, values, logits_RV: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    expected = [kept(theirs(v)(None, logits_RV[r : r + 1]))[0] for r, v in enumerate(values)]
    assert_filtered(own(logits_RV, values), logits_RV, expected)


def naive_top_k(row: np.ndarray, k: int) -> set[int]:
    return {i for i in range(len(row)) if row[i] > -np.inf and (row > row[i]).sum() < k}


def naive_top_p(row: np.ndarray, top_p: float) -> set[int]:
    probs = softmax(row.astype(np.float64))
    return {i for i in range(len(row)) if row[i] > -np.inf and probs[row > row[i]].sum() < top_p}


def naive_min_p(row: np.ndarray, min_p: float) -> set[int]:
    probs = softmax(row.astype(np.float64))
    return {i for i in range(len(row)) if probs[i] >= min_p * probs.max()}


def naive_typical_p(row: np.ndarray, mass: float) -> set[int]:
    probs = softmax(row.astype(np.float64))
    surprise = -np.log(probs, where=probs > 0, out=np.full_like(probs, -np.inf))
    entropy = (probs[probs > 0] * surprise[probs > 0]).sum()
    distance = np.abs(surprise - entropy)
    return {i for i in range(len(row)) if probs[i] > 0 and probs[distance < distance[i] - 1e-5].sum() < mass}


NAIVE = [(steps.filter_top_k, naive_top_k, [1, 2, 3, 4, 9, 40])] + [
    (own, naive, [0.05, 0.3, 0.5, 0.7, 0.9, 0.98])
    for own, naive in (
        (steps.filter_top_p, naive_top_p),
        (steps.filter_min_p, naive_min_p),
        (steps.filter_typical_p, naive_typical_p),
    )
]


@pytest.mark.parametrize(("own", "naive", "values"), NAIVE, ids=["top_k", "top_p", "min_p", "typical_p"])
def test_filters_keep_ties_together_and_pass_over_masked_tokens(own, naive, values) -> None:  # type: ignore[no-untyped-def]
    """Logits of a few levels, as bf16 makes them, and a third of the tokens already at -inf."""
    generator = torch.Generator().manual_seed(5)
    logits_RV = torch.randint(-6, 7, (R, 40), generator=generator).float() / 2
    logits_RV[:, ::3] = -torch.inf
    logits_RV[4, :] = -torch.inf
    logits_RV[4, 7] = 0.0  # one token left
    expected = [naive(row, value) for row, value in zip(logits_RV.numpy(), values, strict=True)]
    assert_filtered(own(logits_RV, values), logits_RV, expected)


def test_widening_gives_what_a_full_sort_gives(monkeypatch: pytest.MonkeyPatch, logits_RV: torch.Tensor) -> None:
    values = [0.05, 0.3, 0.6, 0.9, 0.99, 0.9999]
    wide = steps.filter_top_p(logits_RV, values)
    monkeypatch.setattr(steps, "FIRST_WIDTH", 3)
    monkeypatch.setattr(steps, "WIDEN", 2)
    assert torch.equal(steps.filter_top_p(logits_RV, values), wide)


def test_a_mass_that_is_met_exactly_takes_no_further_token() -> None:
    keys, probs = torch.tensor([[1.0, 3.0, 2.0]] * 4), torch.tensor([[0.25, 0.5, 0.25]] * 4)
    assert steps.prefix_threshold(keys, probs, [0.5, 0.51, 0.75, 0.76]).tolist() == [3.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize("own", [steps.filter_top_k, steps.filter_top_p, steps.filter_min_p, steps.filter_typical_p])
def test_a_nan_row_changes_no_other(own, logits_RV: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    values = [3] * R if own is steps.filter_top_k else [0.5] * R
    expected = own(logits_RV, values)
    logits_RV[2, 5] = torch.nan
    logits_RV[3] = -torch.inf
    result = own(logits_RV, values)
    others = [0, 1, 4, 5]
    assert torch.equal(result[others], expected[others])
    assert bool(result[2].isnan().any())


# ------------------------------------------------------------------------------------------------ the draw


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for number, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)):
        ids, total = steps.draw(probs, torch.tensor([number], dtype=torch.float64))
        assert ids.tolist() == [token], number
        assert total.tolist() == [1.0]


def test_draw_never_leaves_the_distribution_however_it_rounds() -> None:
    """The highest uniform there is, for totals of every size: the last token of positive mass."""
    generator = torch.Generator().manual_seed(3)
    probs = torch.rand(2000, 8, generator=generator)
    probs[:, 5:] = 0
    ids, _ = steps.draw(probs, torch.full((2000,), 1 - 2**-53, dtype=torch.float64))
    assert set(ids.tolist()) == {4}


def test_draw_is_right_in_the_tail_of_150_thousand_tokens() -> None:
    """After a head of 0.999 each token has 6.6e-9: a float32 running sum cannot tell nine neighbours apart."""
    vocab = 151_936
    probs = torch.full((1, vocab), 1e-3 / (vocab - 1))
    probs[0, 0] = 0.999
    uniforms = torch.linspace(0.9991, 0.9999, 32, dtype=torch.float64)
    ids, _ = steps.draw(probs.expand(32, vocab), uniforms)
    cumulative = np.cumsum(probs[0].numpy().astype(np.float64))
    expected = np.searchsorted(cumulative, uniforms.numpy() * cumulative[-1], side="right")
    assert np.abs(ids.numpy() - expected).max() <= 1


def test_draw_says_when_there_is_nothing_to_draw() -> None:
    probs = torch.tensor([[torch.nan, 0.5], [0.0, 0.0], [0.0, 1.0]])
    ids, total = steps.draw(probs, torch.full((3,), 0.5, dtype=torch.float64))
    assert [value > 0 for value in total.tolist()] == [False, False, True]
    assert ids[2] == 1
    assert all(0 <= token < 2 for token in ids.tolist())
