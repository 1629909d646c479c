"""What a user asks of sampling. Names, defaults and ranges are vLLM's `SamplingParams`; no torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.errors import UsageError
from paceline.registry import refuse_unknown_keys

GREEDY_BELOW = 1e-5  # a temperature under this means greedy


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it stops.

    `max_tokens` None runs to the model's own end or the context's. `top_k` 0 or -1, `top_p` 1, `min_p` 0 and
    `typical_p` 1 are off. `seed` None draws one from the engine's seed; a request with a seed gets the same text
    whatever else is in the batch. `logprobs` k returns the k likeliest tokens' raw log probabilities beside the
    chosen token's; -1 returns the whole vocabulary's.

    Raises UsageError for a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None  # keep only the prompt's last k tokens; never done unless asked
    priority: int = 0  # smaller is served earlier, under the "priority" policy

    def __post_init__(self) -> None:
        # Sequences become tuples, so that a caller's later change of a list changes nothing here.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW
