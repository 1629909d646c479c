"""Speculation is lossless: exact under greedy and seed by seed, and by distribution under sampling.

The target is a tiny language model, a table of logits by the last two tokens, so that the probability of every
sequence can be computed exactly, in float64 and by other code than the sampler's.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy import stats

from paceline.sampling.params import SamplingParams
from paceline.sampling.sampler import NO_TOKEN, SamplingRow, sample
from paceline.speculative.verify import rows_with_drafts, verify

V, LENGTH, PROMPT, STOP = 5, 4, (0, 3), 4
TABLE = torch.randn(V, V, V, generator=torch.Generator().manual_seed(8)) * 1.5  # by last but one, last, next
Proposer = Callable[[Sequence[int]], list[int]]

CASES = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(top_k=3),
    "top_p": SamplingParams(temperature=1.2, top_p=0.8),
    "penalties": SamplingParams(repetition_penalty=1.5, presence_penalty=0.6, frequency_penalty=0.5),
    "all": SamplingParams(
        temperature=0.8,
        top_k=4,
        top_p=0.95,
        repetition_penalty=1.3,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        min_tokens=3,
    ),
}


def propose_likely(tokens: Sequence[int]) -> list[int]:
    """Three drafts, each the raw model's likeliest successor: right sometimes, as a lookup in real text is."""
    path = list(tokens)
    for _ in range(3):
        path.append(int(TABLE[path[-2], path[-1]].argmax()))
    return path[len(tokens) :]


def propose_wrongly(tokens: Sequence[int]) -> list[int]:
    """The least likely successor, then anything."""
    return [int(TABLE[tokens[-2], tokens[-1]].argmin()), 1, 2]


def propose_nothing(tokens: Sequence[int]) -> list[int]:
    return []


def generate(params: SamplingParams, seeds: Sequence[int], propose: Proposer) -> tuple[list[tuple[int, ...]], float]:
    """LENGTH tokens for each seed, all seeds in one batch, and how many tokens a step gave."""
    outputs: list[list[int]] = [[] for _ in seeds]
    steps = 0
    while running := [i for i, output in enumerate(outputs) if len(output) < LENGTH]:
        rows: list[SamplingRow] = []
        contexts: list[tuple[int, ...]] = []
        drafted = {}
        for i in running:
            drafts = drafted[i] = propose((*PROMPT, *outputs[i]))
            position = len(PROMPT) + len(outputs[i])
            row = SamplingRow(params, seeds[i], position, PROMPT, outputs[i], frozenset({STOP}))
            rows += rows_with_drafts(row, drafts)
            contexts += [(*PROMPT, *outputs[i], *drafts[:n])[-2:] for n in range(len(drafts) + 1)]
        index = torch.tensor(contexts)
        sampled = sample(TABLE[index[:, 0], index[:, 1]], rows).token_ids
        start = 0
        for i in running:
            stop = start + len(drafted[i]) + 1
            outputs[i] += verify(drafted[i], sampled[start:stop])
            start = stop
        steps += len(running)
    return [tuple(output[:LENGTH]) for output in outputs], sum(map(len, outputs)) / steps


def next_probs(params: SamplingParams, output: Sequence[int]) -> list[float]:
    """The exact distribution of the token after PROMPT and `output`, straight from the definitions."""
    path = (*PROMPT, *output)
    logits = [float(x) for x in TABLE[path[-2], path[-1]]]
    if len(output) < params.min_tokens:
        logits[STOP] = -math.inf
    for token in set(path):
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token, count in Counter(output).items():
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    weights = [math.exp(logit / params.temperature) for logit in logits]
    ranked = sorted(range(V), key=lambda token: -weights[token])[: params.top_k or V]
    total, mass, kept = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        if mass < params.top_p:
            kept.append(token)
        mass += weights[token] / total
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(V)]


def sequence_prob(params: SamplingParams, sequence: Sequence[int]) -> float:
    return math.prod(next_probs(params, sequence[:n])[token] for n, token in enumerate(sequence))


@pytest.mark.parametrize(
    ("case", "propose"),
    [*((case, propose_likely) for case in CASES), ("plain", propose_wrongly), ("all", propose_wrongly)],
)
def test_the_law_of_the_text_is_the_targets(case: str, propose: Proposer) -> None:
    """Chi-square of 2,500 texts of four tokens, over seeds, against the exact probability of each of 625."""
    params, n = CASES[case], 2500
    texts, tokens_per_step = generate(params, range(n), propose)
    if propose is propose_likely:
        assert tokens_per_step > 1.2  # drafts are accepted often enough for the test to mean something
    exact = {text: sequence_prob(params, text) for text in itertools.product(range(V), repeat=LENGTH)}
    assert sum(exact.values()) == pytest.approx(1)
    counts = Counter(texts)
    assert all(exact[text] > 0 for text in counts)
    common = [text for text, prob in exact.items() if prob * n >= 5]
    rest = 1 - sum(exact[text] for text in common)
    observed = np.array([counts[text] for text in common] + [n - sum(counts[text] for text in common)])
    expected = np.array([exact[text] * n for text in common] + [rest * n])
    keep = expected > 1e-6
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3


@pytest.mark.parametrize("propose", [propose_likely, propose_wrongly])
@pytest.mark.parametrize("case", CASES)
def test_seed_by_seed_the_text_is_that_of_no_speculation(case: str, propose: Proposer) -> None:
    plain, one = generate(CASES[case], range(200), propose_nothing)
    assert one == 1
    assert generate(CASES[case], range(200), propose)[0] == plain


def test_greedy_is_exact_and_a_right_proposer_is_quick() -> None:
    params = SamplingParams(temperature=0)
    plain, _ = generate(params, [0], propose_nothing)
    likely, tokens_per_step = generate(params, [0], propose_likely)
    assert likely == plain == generate(params, [0], propose_wrongly)[0]
    assert tokens_per_step == 4  # three drafts, all right, and one more


def test_rows_follow_the_path_of_the_drafts() -> None:
    row = SamplingRow(SamplingParams(), 9, 5, [1, 2, 3], [4, 5], frozenset({7}))
    rows = rows_with_drafts(row, [6, 8])
    assert [r.position for r in rows] == [5, 6, 7]
    assert [list(r.output_token_ids) for r in rows] == [[4, 5], [4, 5, 6], [4, 5, 6, 8]]
    assert all(r.seed == 9 and r.prompt_token_ids == [1, 2, 3] and r.stop_token_ids == {7} for r in rows)
    assert rows_with_drafts(row, []) == [row]


def test_verify_keeps_the_agreeing_prefix_and_one_more() -> None:
    assert verify([], [4]) == (4,)
    assert verify([1, 2], [1, 2, 3]) == (1, 2, 3)
    assert verify([1, 2], [1, 5, 3]) == (1, 5)
    assert verify([1, 2], [5, 2, 3]) == (5,)


def test_a_failed_row_ends_the_path_if_it_is_reached() -> None:
    assert verify([1, 2], [1, NO_TOKEN, 3]) == (1, NO_TOKEN)
    assert verify([1, 2], [4, NO_TOKEN, 3]) == (4,)


def test_verify_refuses_a_wrong_number_of_rows() -> None:
    with pytest.raises(ValueError, match="2 drafts need 3 sampled tokens, got 2"):
        verify([1, 2], [1, 2])
