"""Log probabilities as plain data, without torch, because the scheduler's side carries them: those a user is given, and
those that beams compare."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class Candidates:
    """A beam's likeliest next tokens, best first; tokens that a mask forbids are left out.

    `logprobs` are what beams compare: the log softmax of the logits, then masks, bias and penalties upon it, in
    transformers' order, without a second normalisation. `raw_logprobs` are the model's own. `entries`: one a
    candidate where the request asked for log probabilities, else empty.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...]
    entries: tuple[TokenLogprobs, ...] = ()


def penalised(logprob: float, length: int, length_penalty: float) -> float:
    """The score of a sequence: its summed log probability / length ** length_penalty. Above 0 favours long ones, since
    log probabilities are negative."""
    return logprob / math.pow(length, length_penalty)


def num_candidates(width: int, num_stop_tokens: int) -> int:
    """Candidates to keep of each beam: even if every beam's stop tokens rank first, `width` that go on remain."""
    return max(2, 1 + num_stop_tokens) * width
