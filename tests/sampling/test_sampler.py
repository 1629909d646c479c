"""The whole sampler: its order, its isolation of rows, its errors and its log probabilities."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from paceline import sizing
from paceline.sampling.params import SamplingParams
from paceline.sampling.sampler import NO_TOKEN, SamplingRow, sample

V = 50


def row(position: int = 0, seed: int = 1, **kwargs: Any) -> SamplingRow:
    fields = ("prompt_token_ids", "output_token_ids", "stop_token_ids", "bad_words_token_ids")
    own = {name: kwargs.pop(name) for name in fields if name in kwargs}
    return SamplingRow(SamplingParams(**kwargs), seed, position, **own)


@pytest.fixture(name="logits_RV")
def make_logits() -> torch.Tensor:
    return torch.randn(12, V, generator=torch.Generator().manual_seed(2)) * 2


def frequencies(logits_V: torch.Tensor, n: int = 4000, **kwargs: Any) -> Counter[int]:
    """Tokens drawn at n positions from one row of logits."""
    rows = [row(position, **kwargs) for position in range(n)]
    return Counter(sample(logits_V.expand(n, -1), rows).token_ids)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def assert_follows(counts: Counter[int], probs: np.ndarray) -> None:
    """Chi-square of the counts against the exact distribution; tokens of probability 0 never occur."""
    total = sum(counts.values())
    assert all(probs[token] > 0 for token in counts)
    observed = np.array([counts[token] for token in range(len(probs))])
    rare = probs * total < 5
    expected = np.append(probs[~rare], probs[rare].sum()) * total
    observed = np.append(observed[~rare], observed[rare].sum())
    assert stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3


# ------------------------------------------------------------------------------------------ what is chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_argmax(logits_RV: torch.Tensor, dtype: torch.dtype) -> None:
    logits = logits_RV.to(dtype)
    result = sample(logits, [row(temperature=0)] * 12)
    assert result.token_ids == logits.float().argmax(dim=1).tolist()
    assert (result.logprobs, result.errors) == ({}, {})


def test_no_rows() -> None:
    assert sample(torch.empty(0, V), []).token_ids == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_sampling_follows_the_tempered_softmax(logits_RV: torch.Tensor, dtype: torch.dtype) -> None:
    logits = logits_RV[0].to(dtype)
    for temperature in (0.5, 1.0, 2.0):
        assert_follows(frequencies(logits, temperature=temperature), softmax(logits.double().numpy() / temperature))


def test_every_step_in_its_order(logits_RV: torch.Tensor) -> None:
    """All parameters at once, against the definition applied one after another in float64. The values are such that
    any two steps exchanged give another distribution."""
    prompt, output = [1, 2, 3, 1], [4, 4, 5]
    logits = logits_RV[1].double().numpy().copy()
    params = {
        "allowed_token_ids": list(range(40)),
        "logit_bias": {int(logits.argmin()): 9.0, 4: 1.0},
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
        "temperature": 1.7,
        "typical_p": 0.9,
        "min_p": 0.05,
        "top_k": 9,
        "top_p": 0.8,
        "min_tokens": 4,
    }
    logits[40:] = -np.inf
    logits[[7, 9, 11]] = -np.inf  # a bad word of one token, one of two that is due, a stop token before min_tokens
    for token, bias in params["logit_bias"].items():
        logits[token] += bias
    for token in {*prompt, *output}:
        logits[token] = logits[token] / 1.4 if logits[token] > 0 else logits[token] * 1.4
    for token, count in Counter(output).items():
        logits[token] -= 0.4 * count + 0.3
    probs = softmax(logits / 1.7)
    surprise = -np.log(probs, where=probs > 0, out=np.full(V, -np.inf))
    distance = np.abs(surprise - (probs[probs > 0] * surprise[probs > 0]).sum())
    order = np.argsort(distance)
    last = int((probs[order].cumsum() < 0.9).sum())
    probs[order[last + 1 :]] = 0
    probs[probs < 0.05 * probs.max()] = 0
    probs[np.argsort(-probs)[9:]] = 0
    probs /= probs.sum()
    order = np.argsort(-probs)
    probs[order[int((probs[order].cumsum() < 0.8).sum()) + 1 :]] = 0
    probs /= probs.sum()
    assert 3 <= (probs > 0).sum() < 9

    counts = frequencies(
        logits_RV[1],
        prompt_token_ids=prompt,
        output_token_ids=output,
        bad_words_token_ids=[[7], [5, 9], [4, 10]],
        stop_token_ids=frozenset({11}),
        **params,
    )
    assert_follows(counts, probs)
    assert set(counts) == set(np.flatnonzero(probs))


def test_typical_p_sees_the_entropy_before_top_k() -> None:
    """One token of 0.4 and sixty of 0.01: the entropy (3.13 nats) is that of the whole, far from the top token's
    surprise, so typical_p drops the top token. After top_k 1 nothing else would have been left."""
    logits = torch.tensor([0.4] + [0.01] * 60).log()
    counts = frequencies(logits, n=300, typical_p=0.5, top_k=1)
    assert 0 not in counts
    assert len(counts) > 30


# ------------------------------------------------------------------------------------------ single features


def greedy_token(logits_V: torch.Tensor, **kwargs: Any) -> int:
    return sample(logits_V.unsqueeze(0), [row(temperature=0, **kwargs)]).token_ids[0]


def test_min_tokens_holds_the_stop_tokens_off_until_reached(logits_RV: torch.Tensor) -> None:
    best, second = logits_RV[0].topk(2).indices.tolist()
    stop = frozenset({best})
    assert greedy_token(logits_RV[0], min_tokens=3, stop_token_ids=stop, output_token_ids=[0, 0]) == second
    assert greedy_token(logits_RV[0], min_tokens=3, stop_token_ids=stop, output_token_ids=[0, 0, 0]) == best
    assert greedy_token(logits_RV[0], stop_token_ids=stop) == best


def test_a_bad_word_ends_only_where_it_began_in_the_output(logits_RV: torch.Tensor) -> None:
    best, second = logits_RV[0].topk(2).indices.tolist()
    bad = [[8, 9, best]]
    assert greedy_token(logits_RV[0], bad_words_token_ids=bad, output_token_ids=[1, 8, 9]) == second
    assert greedy_token(logits_RV[0], bad_words_token_ids=bad, output_token_ids=array("q", [8, 9])) == second
    assert greedy_token(logits_RV[0], bad_words_token_ids=bad, output_token_ids=[1, 9, 8]) == best
    assert greedy_token(logits_RV[0], bad_words_token_ids=bad, output_token_ids=[9]) == best
    assert greedy_token(logits_RV[0], bad_words_token_ids=bad, prompt_token_ids=[8], output_token_ids=[9]) == best
    assert greedy_token(logits_RV[0], bad_words_token_ids=[[best], []]) == second


def test_penalties_of_a_greedy_row_and_what_they_count() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1])
    assert greedy_token(logits, repetition_penalty=1.2, prompt_token_ids=[0]) == 1
    assert greedy_token(logits, frequency_penalty=0.2, prompt_token_ids=[0]) == 0
    assert greedy_token(logits, presence_penalty=0.2, prompt_token_ids=[0]) == 0
    assert greedy_token(logits, frequency_penalty=0.06, output_token_ids=[0]) == 0
    assert greedy_token(logits, frequency_penalty=0.06, output_token_ids=[0, 0]) == 1
    assert greedy_token(logits, presence_penalty=0.06, output_token_ids=[0, 0]) == 0
    assert greedy_token(logits, presence_penalty=0.11, output_token_ids=[0]) == 1


@pytest.mark.parametrize("kind", [list, tuple, lambda ids: array("q", ids), np.array])
def test_histories_may_be_lists_or_buffers(kind: Any) -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert greedy_token(logits, repetition_penalty=1.2, prompt_token_ids=kind([2, 0]), output_token_ids=kind([0])) == 1


def test_the_callers_logits_are_left_alone(logits_RV: torch.Tensor) -> None:
    before = logits_RV.clone()
    rows = [row(logit_bias={3: 5.0}, allowed_token_ids=[1, 3], top_k=1, logprobs=2, temperature=0.5)] * 12
    sample(logits_RV, rows)
    assert torch.equal(logits_RV, before)


# ------------------------------------------------------------------------------------------------ isolation


def mixed_rows() -> list[SamplingRow]:
    """Twelve rows, each asking for something else."""
    history = {"prompt_token_ids": [1, 2, 3], "output_token_ids": [4, 4, 5]}
    wishes: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.9, "logprobs": 3},
        {"top_k": 3, "logprobs": 0},
        {"typical_p": 0.4},
        {"min_p": 0.2, "logprobs": -1},
        {"temperature": 0, "repetition_penalty": 1.5, **history},
        {"frequency_penalty": 1.0, "presence_penalty": -1.0, **history},
        {"allowed_token_ids": [3, 30], "logprobs": 3},
        {"logit_bias": {5: 4.0}},
        {"bad_words_token_ids": [[0], [5, 1]], **history},
        {"min_tokens": 9, "stop_token_ids": frozenset({2, 6}), **history},
        {"temperature": 3.0, "top_k": 40, "top_p": 0.3},
    ]
    return [row(position=100 + i, seed=i, **wish) for i, wish in enumerate(wishes)]


def test_a_row_gets_the_same_alone_and_in_a_batch(logits_RV: torch.Tensor) -> None:
    rows = mixed_rows()
    together = sample(logits_RV, rows)
    for i in range(12):
        alone = sample(logits_RV[i : i + 1], rows[i : i + 1])
        assert alone.token_ids == together.token_ids[i : i + 1]
        assert alone.logprobs.get(0) == together.logprobs.get(i)
    backwards = sample(logits_RV.flip(0), rows[::-1])
    assert backwards.token_ids == together.token_ids[::-1]


def test_the_seed_and_the_position_decide_the_draw(logits_RV: torch.Tensor) -> None:
    def drawn(seed: int, positions: range) -> list[int]:
        flat = torch.zeros(len(positions), 1000)
        return sample(flat, [row(position, seed) for position in positions]).token_ids

    assert drawn(1, range(50)) == drawn(1, range(50))
    assert drawn(1, range(50)) != drawn(2, range(50))
    assert drawn(1, range(10, 60)) == drawn(1, range(60))[10:]
    assert len(set(drawn(1, range(50)))) > 40


def test_broken_rows_fail_alone(logits_RV: torch.Tensor) -> None:
    rows = mixed_rows()
    expected = sample(logits_RV, rows)
    broken = logits_RV.clone()
    broken[0, 5] = torch.nan  # greedy
    broken[1] = torch.nan  # top_p
    broken[3, 0] = torch.nan  # typical_p
    broken[4, 1] = torch.inf
    broken[7, [3, 30]] = -torch.inf  # nothing that is allowed is left
    result = sample(broken, rows)
    assert set(result.errors) == {0, 1, 3, 4, 7}
    assert all("not finite" in result.errors[i] for i in (0, 1, 3, 4))
    assert "allowed_token_ids" in result.errors[7]
    assert [result.token_ids[i] for i in result.errors] == [NO_TOKEN] * 5
    for i in set(range(12)) - set(result.errors):
        assert result.token_ids[i] == expected.token_ids[i]
    assert set(result.logprobs) == {2}


@pytest.mark.parametrize("temperature", [0, 1])
def test_masks_that_leave_nothing_are_an_error_of_the_row(temperature: int) -> None:
    forbidden = row(temperature=temperature, allowed_token_ids=[2], bad_words_token_ids=[[2]])
    result = sample(torch.zeros(2, 5), [forbidden, row(temperature=temperature)])
    assert list(result.errors) == [0]
    assert result.token_ids[0] == NO_TOKEN
    assert 0 <= result.token_ids[1] < 5


@pytest.mark.gpu
def test_a_gpu_chooses_what_the_cpu_chooses(logits_RV: torch.Tensor) -> None:
    rows = mixed_rows()
    logits_RV[9, 3] = torch.nan
    host, device = sample(logits_RV, rows), sample(logits_RV.cuda(), rows)
    assert device.token_ids == host.token_ids
    assert device.errors == host.errors
    assert {r: (e.rank, list(e.top)) for r, e in device.logprobs.items()} == {
        r: (e.rank, list(e.top)) for r, e in host.logprobs.items()
    }


# ---------------------------------------------------------------------------------------- log probabilities


def test_logprobs_are_raw_and_ranked(logits_RV: torch.Tensor) -> None:
    expected = logits_RV.double().log_softmax(dim=1)
    params = {"temperature": 0.3, "top_k": 2, "logit_bias": {int(logits_RV[0].argmin()): 100.0}}
    rows = [row(i, logprobs=k, **params) for i, k in enumerate([0, 1, 5, -1, 10**6])]
    result = sample(logits_RV[:5], rows)
    for i, num_top in enumerate([0, 1, 5, V, V]):
        entry = result.logprobs[i]
        assert entry.token_id == result.token_ids[i]
        assert entry.logprob == pytest.approx(float(expected[i, entry.token_id]), abs=1e-5)
        assert entry.rank == 1 + int((expected[i] > expected[i, entry.token_id]).sum())
        likeliest = expected[i].argsort(descending=True)[:num_top].tolist()
        assert list(entry.top) == likeliest
        assert list(entry.top.values()) == pytest.approx(expected[i, likeliest].tolist(), abs=1e-5)
    assert result.logprobs[0].rank == V  # the bias made the least likely token win, and its raw rank tells


def test_tied_tokens_share_the_better_rank() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]])
    for token, rank in ((0, 5), (1, 1), (2, 3), (3, 1), (4, 3)):
        result = sample(logits, [row(temperature=0, logprobs=0, allowed_token_ids=[token])])
        assert (result.token_ids, result.logprobs[0].rank, result.logprobs[0].top) == ([token], rank, {})


def test_rows_in_slices_are_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows between drawn ones, filters that some have, and a row that fails."""
    wishes = [
        {},
        {"temperature": 0},
        {"top_k": 5},
        {"top_p": 0.5},
        {"typical_p": 0.4},
        {"min_p": 0.1},
        {"temperature": 0},
    ]
    rows = [SamplingRow(SamplingParams(**wish), seed=3, position=index) for index, wish in enumerate(wishes)]
    logits_RV = torch.randn(len(rows), 60)
    logits_RV[5, 3] = torch.nan
    whole = sample(logits_RV, rows)
    monkeypatch.setattr(sizing, "SAMPLED_VALUES", 2 * 60)
    assert sample(logits_RV, rows) == whole
    assert list(whole.errors) == [5]
