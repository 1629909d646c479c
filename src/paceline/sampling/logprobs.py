"""The log probabilities a user is given. A type of its own without torch, because the scheduler's side carries it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """Raw log probabilities at one position: of the chosen token, its rank from 1, and of the likeliest ones.

    Raw: the log softmax of the model's logits, before any mask, penalty or temperature. `rank` is 1 + the number
    of tokens strictly likelier, so that tied tokens share the better rank.
    """

    token_id: int
    logprob: float
    rank: int
    top: Mapping[int, float]  # token id -> log probability, likeliest first
