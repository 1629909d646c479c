"""The steps from logits to a token, one function each, in the order in which sampler.py applies them.

Shapes: R rows (one a token to be chosen), V vocabulary, N (row, token) pairs, W the likeliest tokens looked at.

A parameter is given as one Python number a row. Steps that change single tokens take the pairs as two int64
tensors rows_N and ids_N and write in place (trailing underscore, as in torch); a row without pairs costs nothing.
Filters take the rows that ask for them and return new logits with -inf for what they drop. Every filter is a
threshold: tokens of equal logit stay or go together, so the result does not depend on how a sort ordered ties, and
bf16 logits tie often.

Nothing here mixes rows or raises for NaN, and only `prefix_threshold` waits for the device; `filter_sorted`, which
takes its parameters as tensors, is there for steps that may not wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FIRST_WIDTH = 256  # tokens that usually hold top_p's mass: topk of 256 from 49,152 costs 0.14 ms, a sort 4 ms
WIDEN = 16  # the next widths tried: 4,096, then 65,536 or all

# ------------------------------------------------------------------------------------ single tokens, in place


def allow_only_(logits_RV: torch.Tensor, rows_N: torch.Tensor, ids_N: torch.Tensor) -> None:
    """In the rows named, every token but those paired with the row becomes -inf."""
    kept_N = logits_RV[rows_N, ids_N]
    logits_RV[rows_N] = -torch.inf
    logits_RV[rows_N, ids_N] = kept_N


def forbid_(logits_RV: torch.Tensor, rows_N: torch.Tensor, ids_N: torch.Tensor) -> None:
    """The pairs become -inf: bad words, and the stop tokens while min_tokens is not reached."""
    logits_RV[rows_N, ids_N] = -torch.inf


def add_bias_(logits_RV: torch.Tensor, rows_N: torch.Tensor, ids_N: torch.Tensor, bias_N: torch.Tensor) -> None:
    """Add to each pair its bias; pairs are distinct."""
    logits_RV[rows_N, ids_N] += bias_N


def penalize_repetition_(
    logits_RV: torch.Tensor, rows_N: torch.Tensor, ids_N: torch.Tensor, penalty: Sequence[float]
) -> None:
    """CTRL's repetition penalty (Keskar et al. 2019) for every token seen, in the prompt or the output: a positive
    logit is divided by the penalty, a negative one multiplied. Pairs may repeat: each is read before any is written."""
    seen_N = logits_RV[rows_N, ids_N]
    penalty_N = _per_row(penalty, logits_RV)[rows_N]
    logits_RV[rows_N, ids_N] = torch.where(seen_N > 0, seen_N / penalty_N, seen_N * penalty_N)


def penalize_frequency_and_presence_(
    logits_RV: torch.Tensor,
    rows_N: torch.Tensor,
    ids_N: torch.Tensor,
    frequency: Sequence[float],
    presence: Sequence[float],
) -> None:
    """OpenAI's penalties over the output's tokens: logit - count * frequency - (count > 0) * presence. A pair is
    given once for each time its token occurs."""
    vocab = logits_RV.shape[1]
    pairs, counts = torch.unique(rows_N * vocab + ids_N, return_counts=True)
    rows, ids = pairs // vocab, pairs % vocab
    logits_RV[rows, ids] -= counts * _per_row(frequency, logits_RV)[rows] + _per_row(presence, logits_RV)[rows]


# --------------------------------------------------------------------------------------- filters of whole rows


def apply_temperature(logits_RV: torch.Tensor, temperature: Sequence[float]) -> torch.Tensor:
    return logits_RV / _per_row(temperature, logits_RV).unsqueeze(1)


def filter_typical_p(logits_RV: torch.Tensor, mass: Sequence[float]) -> torch.Tensor:
    """Locally typical sampling (Meister et al. 2023): keep the tokens whose surprise -log p is nearest to the
    distribution's entropy, as many as it takes to hold `mass`. Surprise is compared in nats, in float32."""
    logprobs_RV = logits_RV.log_softmax(dim=1)
    probs_RV = logprobs_RV.exp()
    # 0 * log 0 counts as 0; where() rather than nansum(), which would hide a NaN row.
    entropy_R = -torch.where(probs_RV == 0, 0.0, probs_RV * logprobs_RV).sum(dim=1)
    nearness_RV = -(logprobs_RV + entropy_R.unsqueeze(1)).abs()
    threshold_R = prefix_threshold(nearness_RV, probs_RV, mass)
    return logits_RV.masked_fill(nearness_RV < threshold_R.unsqueeze(1), -torch.inf)


def filter_min_p(logits_RV: torch.Tensor, min_p: Sequence[float]) -> torch.Tensor:
    """Keep the tokens with p >= min_p * the likeliest one's p (Nguyen et al. 2024), which needs no softmax."""
    threshold_R = logits_RV.amax(dim=1) + _per_row(min_p, logits_RV).log()
    return logits_RV.masked_fill(logits_RV < threshold_R.unsqueeze(1), -torch.inf)


def filter_top_k(logits_RV: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """Keep the k likeliest tokens and those tied with the k-th (Fan et al. 2018)."""
    vocab = logits_RV.shape[1]
    clamped = [min(k, vocab) for k in top_k]
    values_RW = logits_RV.topk(max(clamped), dim=1).values
    last_R1 = torch.tensor(clamped, device=logits_RV.device).unsqueeze(1) - 1
    return logits_RV.masked_fill(logits_RV < values_RW.gather(1, last_R1), -torch.inf)


def filter_top_p(logits_RV: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """Nucleus sampling (Holtzman et al. 2020): keep the likeliest tokens, as few as hold a mass of top_p of what
    the filters before left, at least one, and those tied with the last of them."""
    threshold_R = prefix_threshold(logits_RV, logits_RV.softmax(dim=1), top_p)
    return logits_RV.masked_fill(logits_RV < threshold_R.unsqueeze(1), -torch.inf)


def filter_sorted(
    logits_RV: torch.Tensor, min_p_R: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor
) -> torch.Tensor:
    """min_p, top_k and top_p, in that order, with the results of the filters above but by one sort of everything: how
    much must be looked at is not asked of the device. sampling/static.py says what switches a filter off."""
    sorted_RV, ids_RV = logits_RV.sort(dim=1, descending=True)
    min_p_threshold_R1 = sorted_RV[:, :1] + min_p_R[:, None].log()
    threshold_R1 = torch.maximum(min_p_threshold_R1, sorted_RV.gather(1, top_k_R[:, None] - 1))
    logits_RV = logits_RV.masked_fill(logits_RV < threshold_R1, -torch.inf)
    held_RV = logits_RV.softmax(dim=1).gather(1, ids_RV).cumsum(dim=1, dtype=torch.float64)
    last_R1 = (held_RV < top_p_R[:, None]).sum(dim=1, keepdim=True).clamp(max=logits_RV.shape[1] - 1)
    # What the first two dropped lies below their threshold, and stays dropped where the mass is reached among it.
    return logits_RV.masked_fill(logits_RV < sorted_RV.gather(1, last_R1), -torch.inf)


def prefix_threshold(keys_RV: torch.Tensor, probs_RV: torch.Tensor, mass: Sequence[float]) -> torch.Tensor:
    """The key at which the tokens, taken in order of descending key, first hold `mass` of the probability.

    Looks at the FIRST_WIDTH highest keys and then, for the rows whose mass they do not hold, at more. A mass that
    rounding keeps out of reach gives the lowest key. Returns float32 [R].
    """
    vocab = keys_RV.shape[1]
    mass_R = _per_row(mass, keys_RV, torch.float64)
    threshold_R = torch.empty_like(keys_RV[:, 0])
    rows, width = torch.arange(len(keys_RV), device=keys_RV.device), min(FIRST_WIDTH, vocab)
    while True:
        top_RW, ids_RW = keys_RV[rows].topk(width, dim=1)
        held_RW = probs_RV[rows].gather(1, ids_RW).cumsum(dim=1, dtype=torch.float64)
        short_RW = held_RW < mass_R[rows].unsqueeze(1)
        last_R1 = short_RW.sum(dim=1, keepdim=True).clamp(max=width - 1)
        threshold_R[rows] = top_RW.gather(1, last_R1).squeeze(1)
        if width == vocab:
            return threshold_R
        rows = rows[short_RW[:, -1]]
        if not len(rows):
            return threshold_R
        width = min(width * WIDEN, vocab)


# ---------------------------------------------------------------------------------------------------- the draw


def draw(probs_RV: torch.Tensor, uniform_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by the inverse of the cumulative distribution: the first token whose cumulative sum exceeds
    uniform * total. Returns its id, int64 [R], and the total, float64 [R]: NaN or 0 where there was nothing to draw.

    `probs_RV` float32, `uniform_R` float64 in [0, 1). The sum runs over the vocabulary in order of id, not of
    probability: a rounding error in a logit then moves each border by as little, where in sorted order it could
    exchange two near-tied tokens' whole intervals. It runs in float64: near 1 float32's spacing is 6e-8, more than a
    tail token's share of a vocabulary of 150,000, so that some tokens would get their neighbours' draws. Scaling by
    the total rather than assuming 1 takes the rounding of the softmax out, and a token of probability 0 is never
    drawn: for a uniform of at most 1 - 2**-53 the product rounds below the total, in every binade.
    """
    cumulative_RV = probs_RV.cumsum(dim=1, dtype=torch.float64)
    total_R1 = cumulative_RV[:, -1:]
    target_R1 = uniform_R.unsqueeze(1) * total_R1
    ids_R = torch.searchsorted(cumulative_RV, target_R1, right=True).squeeze(1)
    # Past the end only where the total is NaN or 0; the id must still be one that can be looked up.
    return ids_R.clamp(max=probs_RV.shape[1] - 1), total_R1.squeeze(1)


def _per_row(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)
