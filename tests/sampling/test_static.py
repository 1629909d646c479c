"""The sampler that asks the device nothing chooses what sampler.py chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import sizing
from paceline.sampling import static, steps
from paceline.sampling.params import SamplingParams
from paceline.sampling.random import uniform
from paceline.sampling.sampler import SamplingRow, sample
from paceline.sampling.static import CHOOSERS, KINDS, TOP_P_OFF, Chosen, Kind, RowParams, kind_of, needs_history

V = 700  # more than steps.FIRST_WIDTH

REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_k": V + 5},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1e-4},
    {"temperature": 2.0, "top_p": 0.9999999},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.9, "min_p": 0.01, "top_k": 30, "top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.3, "top_k": 500, "top_p": 0.99},
]


def as_tensors(rows: list[SamplingRow]) -> RowParams:
    params = [row.params for row in rows]
    return RowParams(
        greedy_R=torch.tensor([p.greedy for p in params]),
        uniform_R=torch.tensor([uniform(row.seed, row.position) for row in rows], dtype=torch.float64),
        temperature_R=torch.tensor([1.0 if p.greedy else p.temperature for p in params]),
        min_p_R=torch.tensor([p.min_p for p in params]),
        top_k_R=torch.tensor([min(p.top_k, V) if p.top_k > 0 else V for p in params]),
        top_p_R=torch.tensor([p.top_p if p.top_p < 1 else TOP_P_OFF for p in params], dtype=torch.float64),
    )


def choose(kind: Kind, logits_RV: torch.Tensor, rows: list[SamplingRow]) -> Chosen:
    chosen = Chosen(torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows)))
    CHOOSERS[kind](logits_RV, as_tensors(rows), chosen)
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.integers(0, len(REQUESTS) - 1), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    coarse=st.booleans(),
)
def test_tokens_are_the_samplers(asked: list[int], seed: int, spread: float, coarse: bool) -> None:
    """`coarse` logits tie often, at the borders of filters too."""
    logits_RV = torch.randn(len(asked), V, generator=torch.Generator().manual_seed(seed)) * spread
    if coarse:
        logits_RV = logits_RV.bfloat16().float()
    rows = [SamplingRow(SamplingParams(**REQUESTS[index]), seed, 7 * r) for r, index in enumerate(asked)]
    least = max((kind_of(row.params) for row in rows), key=KINDS.index)
    for kind in KINDS[KINDS.index(least) :]:
        chosen = choose(kind, logits_RV, rows)
        assert chosen.ids_R.tolist() == sample(logits_RV, rows).token_ids
        assert chosen.values_R.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, "nothing"])
def test_a_row_that_is_not_finite_is_seen_and_its_token_can_be_looked_up(kind: Any, broken: Any) -> None:
    logits_RV = torch.randn(4, V, generator=torch.Generator().manual_seed(1))
    if broken == "nothing":
        logits_RV[1:3] = -torch.inf
    else:
        logits_RV[1:3, 13] = broken
    asked = [{"temperature": 0.0 if kind == "greedy" or r % 2 else 1.0} for r in range(4)]
    rows = [SamplingRow(SamplingParams(**one), 1, r) for r, one in enumerate(asked)]
    chosen = choose(kind, logits_RV, rows)
    tokens = chosen.ids_R.tolist()
    assert chosen.values_R.isfinite().tolist() == [True, False, False, True]
    assert all(0 <= token < V for token in tokens)
    assert [tokens[r] for r in (0, 3)] == [sample(logits_RV, rows).token_ids[r] for r in (0, 3)]


@pytest.mark.parametrize(
    "asked",
    [
        {"n": 2, "use_beam_search": True, "temperature": 0},
        {"logprobs": 0},
        {"n": 1, "best_of": 2},
        {"typical_p": 0.9},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3]},
        {"bad_words": ["a"]},
    ],
)
def test_what_is_left_to_the_sampler(asked: dict[str, Any]) -> None:
    assert needs_history(SamplingParams(**asked))
    assert not needs_history(SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, seed=1, stop=["a"]))


@pytest.mark.parametrize("kind", ["drawn", "filtered"])
def test_rows_in_slices_are_as_all_at_once(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(**request) for request in REQUESTS[: 3 if kind == "drawn" else None]]
    rows = [SamplingRow(one, seed=7, position=index) for index, one in enumerate(params)]
    logits_RV = torch.randn(len(rows), V) * 3
    logits_RV[1] = torch.nan
    whole = choose(kind, logits_RV, rows)
    monkeypatch.setattr(sizing, "SAMPLED_VALUES", 2 * V)
    parts = choose(kind, logits_RV, rows)
    assert torch.equal(parts.ids_R, whole.ids_R)
    torch.testing.assert_close(parts.values_R, whole.values_R, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("seed", "spread", "coarse"), [(1, 5.0, False), (2, 1.0, True)])
def test_borders_that_are_searched_for_are_those_of_a_sort(seed: int, spread: float, coarse: bool) -> None:
    rows = [SamplingRow(SamplingParams(**request), 7, 3) for request in REQUESTS]
    params = as_tensors(rows)
    logits_RV = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(seed)) * spread
    if coarse:
        logits_RV = logits_RV.bfloat16().float()
    logits_RV[:, 5] = -torch.inf
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = [values_R.to(device) for values_R in (params.min_p_R, params.top_k_R, params.top_p_R)]
    logits_RV = logits_RV.to(device)
    assert torch.equal(static.filter_selected(logits_RV, *asked), steps.filter_sorted(logits_RV, *asked))


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter, on the CPU")
def test_a_batch_takes_the_search_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And chooses the sampler's tokens."""
    monkeypatch.setattr(static, "select_refusal", lambda values_RV: None)
    monkeypatch.setattr(steps, "filter_sorted", None)
    rows = [SamplingRow(SamplingParams(**request), 7, index) for index, request in enumerate(REQUESTS)]
    logits_RV = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(3)) * 3
    assert choose("filtered", logits_RV, rows).ids_R.tolist() == sample(logits_RV, rows).token_ids
