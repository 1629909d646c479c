"""The values that pass between the scheduler and the model runner, one pair a step. Plain data, no torch.

Scheduler.schedule() -> SchedulerOutput -> ModelRunner.run() -> StepOutput -> Scheduler.update().
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from paceline.sampling.logprobs import Candidates, TokenLogprobs
from paceline.sampling.params import SamplingParams

PLACEHOLDER = -1  # a token that an earlier step, still in flight, will choose; the runner knows it by then

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class NewRequest:
    """What the runner must know of a request, sent once, with the first step that holds it."""

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]  # end-of-sequence ids (unless ignore_eos) and params.stop_token_ids
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    output_token_ids: Sequence[int] = ()  # chosen before, by an engine that is gone


# Named tuples where a step has one a request: a frozen dataclass of seven fields takes 1.5 us to make, these 0.5.
class ScheduledRequest(NamedTuple):
    """One request's share of a step: compute `token_ids` at positions start, start+1, ...

    `num_drafts` of them, the last ones, are proposed and not yet accepted. `samples`: this step reaches the end of
    the known tokens, so its last 1 + num_drafts rows choose tokens; otherwise it is a prefill chunk and chooses none.
    `block_tables`: one a KV group; the same object as last step's while unchanged. `scored`: positions of this step
    whose logits give the log probability of the prompt token after them.
    """

    request_id: str
    start: int
    token_ids: tuple[int, ...]
    num_drafts: int
    samples: bool
    block_tables: tuple[tuple[int, ...], ...]
    scored: range = range(0)

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.token_ids[len(self.token_ids) - self.num_drafts :]


@dataclass(frozen=True)
class BlockCopy:
    """Copy a block's keys and values before the step: a shared block is about to be written (copy-on-write)."""

    group: int
    source: int
    target: int


@dataclass(frozen=True)
class Branch:
    """What a beam is from now on: all the tokens that `parent_id` had, then `token_id`. A step's branches are read all
    at once, before any takes effect; a `request_id` that the runner does not know begins with its branch."""

    request_id: str
    parent_id: str
    token_id: int


@dataclass(frozen=True)
class SchedulerOutput:
    """One step. `finished` ids are forgotten by the runner before it looks at the rest."""

    scheduled: tuple[ScheduledRequest, ...]
    new_requests: tuple[NewRequest, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    finished: tuple[str, ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(request.token_ids) for request in self.scheduled)


@dataclass(frozen=True)
class StepOutput:
    """What a step chose. A request that `samples` has 1 to 1 + num_drafts tokens (accepted drafts, then one more)
    in `token_ids`, or a message in `errors`; a prefill chunk has neither. `logprobs` parallels `token_ids` for the
    requests that asked; `prompt_logprobs` parallels `scored`. A beam that `samples` has `candidates`, not tokens."""

    token_ids: Mapping[str, tuple[int, ...]]
    logprobs: Mapping[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    prompt_logprobs: Mapping[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    candidates: Mapping[str, Candidates] = field(default_factory=dict)


class RequestUpdate(NamedTuple):
    """What one step changed for one request, as Scheduler.update() reports it: tokens after any stop are cut off.

    `prompt_logprobs`: those of all prompt tokens but the first, in the one update that completes them; else None.
    A beam's answer comes whole, in one update; it alone has `score` and `cumulative_logprob` (the sum of the raw log
    probabilities, known whether or not `logprobs` were asked for).
    """

    request_id: str
    new_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string; None for the model's own end
    error: str | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    score: float | None = None
    cumulative_logprob: float | None = None
