"""Raw log probabilities: what the model said, before any mask, penalty or temperature.

Shapes: R rows that asked, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the engine's torch-free modules import TokenLogprobs from here
    import torch


@dataclass(frozen=True)
class TokenLogprobs:
    """Raw log probabilities at one position: of the chosen token, its rank from 1, and of the likeliest ones.

    `rank` is 1 + the number of tokens strictly likelier, so that tied tokens share the better rank.
    """

    token_id: int
    logprob: float
    rank: int
    top: Mapping[int, float]  # token id -> log probability, likeliest first


def token_logprobs(
    logprobs_RV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """The chosen tokens' entries; row r's `top` holds num_top[r] tokens, all V of them for -1.

    `logprobs_RV`: float32, the log softmax of the raw logits. Three transfers to the host, plus one for each
    distinct `num_top`: rows are grouped by it, because how torch.topk orders tied tokens depends on k and must
    not depend on what a neighbour asked for.
    """
    vocab = logprobs_RV.shape[1]
    chosen_R1 = logprobs_RV.new_tensor(token_ids, dtype=_int64()).unsqueeze(1)
    chosen_logprob_R1 = logprobs_RV.gather(1, chosen_R1)
    ranks = (logprobs_RV > chosen_logprob_R1).sum(dim=1).add(1).tolist()
    values = chosen_logprob_R1.squeeze(1).tolist()
    tops: list[dict[int, float]] = [{} for _ in token_ids]
    for wanted in sorted(set(num_top)):
        k = vocab if wanted < 0 else min(wanted, vocab)
        rows = [row for row, num in enumerate(num_top) if num == wanted]
        if not k or not rows:
            continue
        top = logprobs_RV[rows].topk(k, dim=1)
        for row, ids, logprobs in zip(rows, top.indices.tolist(), top.values.tolist(), strict=True):
            tops[row] = dict(zip(ids, logprobs, strict=True))
    return [
        TokenLogprobs(token, value, rank, top)
        for token, value, rank, top in zip(token_ids, values, ranks, tops, strict=True)
    ]


def _int64() -> torch.dtype:
    import torch

    return torch.int64
