"""Log probabilities of given tokens, in slices of bounded memory: a prompt's own, or the tokens just chosen.

Shapes: L rows of logits that are scored, S of them at a time, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from paceline import sizing
from paceline.sampling.logprobs import TokenLogprobs


def score_tokens(logits_LV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Each row's token with its raw log probability and rank, and the row's `num_top` likeliest tokens: -1 or more
    than V is all V. `logits_LV`: any float dtype. A row that is not finite gives NaN and raises nothing."""
    entries: list[TokenLogprobs] = []
    for first, end in _slices(num_top, logits_LV.shape[1]):
        entries += _score(logits_LV[first:end], token_ids[first:end], num_top[first:end])
    return entries


def score_hidden(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden_LD: torch.Tensor,
    vocab_size: int,
    token_ids: Sequence[int],
    num_top: Sequence[int],
) -> list[TokenLogprobs]:
    """As `score_tokens`, from hidden states: `logits` (hidden_SD -> logits_SV) is asked for one slice at a time."""
    entries: list[TokenLogprobs] = []
    for first, end in _slices(num_top, vocab_size):
        entries += _score(logits(hidden_LD[first:end]), token_ids[first:end], num_top[first:end])
    return entries


def _slices(num_top: Sequence[int], vocab_size: int) -> list[tuple[int, int]]:
    """(first, end) of slices of the rows; the row that returns most decides the size of all."""
    widest = max((vocab_size if k < 0 else k for k in num_top), default=0)
    size = sizing.logprob_rows(vocab_size, widest)
    bounds = [*range(0, len(num_top), size), len(num_top)]
    return list(pairwise(bounds))


def _score(logits_SV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    logprobs_SV = logits_SV.float().log_softmax(dim=1)
    chosen_S1 = torch.tensor(token_ids, device=logits_SV.device).unsqueeze(1)
    chosen_logprob_S1 = logprobs_SV.gather(1, chosen_S1)
    ranks = ((logprobs_SV > chosen_logprob_S1).sum(dim=1) + 1).tolist()
    values = chosen_logprob_S1.squeeze(1).tolist()
    tops = _top_logprobs(logprobs_SV, num_top)
    return [TokenLogprobs(*entry) for entry in zip(token_ids, values, ranks, tops, strict=True)]


def _top_logprobs(logprobs_SV: torch.Tensor, num_top: Sequence[int]) -> list[dict[int, float]]:
    """Row by row the num_top likeliest tokens, all V for -1. One topk for each distinct number: how topk orders tied
    tokens depends on its k, and must not depend on what a neighbour asked for."""
    tops: list[dict[int, float]] = [{} for _ in num_top]
    vocab = logprobs_SV.shape[1]
    for wanted in set(num_top) - {0}:
        chosen = [row for row, num in enumerate(num_top) if num == wanted]
        asking_SV = logprobs_SV if len(chosen) == len(num_top) else logprobs_SV[chosen]
        top = asking_SV.topk(vocab if wanted < 0 else min(wanted, vocab), dim=1)
        for row, ids, values in zip(chosen, top.indices.tolist(), top.values.tolist(), strict=True):
            tops[row] = dict(zip(ids, values, strict=True))
    return tops
