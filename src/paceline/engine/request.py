"""One generation in the engine: what was asked, the tokens so far, and how many of them are computed. No torch."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.engine.step import FinishReason, NewRequest, RequestUpdate
from paceline.sampling.logprobs import TokenLogprobs
from paceline.sampling.params import SamplingParams


def child_id(request_id: str, index: int, n: int) -> str:
    """The id of answer `index` of a request with n answers: the request's own where n is 1."""
    return request_id if n == 1 else f"{request_id}#{index}"


class Status(enum.Enum):
    WAITING = "waiting"  # not started
    RUNNING = "running"
    PREEMPTED = "preempted"  # started, lost its blocks, waits to be computed again
    FINISHED = "finished"


@dataclass(frozen=True)
class RequestSpec:
    """What is asked, and never changes. Token ids throughout.

    `seed` is the one that sampling uses (params.seed, or one drawn by the engine). `namespace` separates prefix caches
    (an adapter's id, a tenant's salt). `fork_of`: the id of a request with the same prompt, added before, whose prompt
    blocks this one may share once they are computed (n > 1). `output_token_ids`: the answer's beginning, chosen by
    an engine that is gone; the request goes on behind it, as after a preemption, and reports none of it again.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    seed: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    namespace: str = ""
    fork_of: str | None = None
    output_token_ids: Sequence[int] = ()


class Request:
    """The state that the scheduler keeps; everything else about a request is a property of it.

    `num_computed_tokens` counts tokens whose keys and values are computed, or will be by a step in flight.
    `num_placeholders`: tokens that steps in flight are going to append. `num_in_flight`: steps that hold the request.
    `num_scored_tokens` counts positions of the prompt whose logits were, or are by a step in flight, turned into the
    log probability of the next prompt token; a recomputation does not score them again. `prompt_logprobs`: what came
    back of them, until all have and are reported; None where none are wanted. Of n answers only the first scores.
    `stop_token_ids` end the output: the model's ends, unless ignored, and the user's.
    """

    __slots__ = (
        "arrival",
        "drafts",
        "drafts_in_flight",
        "finish_reason",
        "id",
        "max_total_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_placeholders",
        "num_prompt_tokens",
        "num_scored_tokens",
        "prompt_logprobs",
        "sent",
        "spec",
        "status",
        "stop_reason",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, spec: RequestSpec) -> None:
        self.spec = spec
        self.id = spec.request_id
        eos = frozenset() if spec.params.ignore_eos else spec.eos_token_ids
        self.stop_token_ids: frozenset[int] = eos | frozenset(spec.params.stop_token_ids)
        self.token_ids: list[int] = [*spec.prompt_token_ids, *spec.output_token_ids]
        self.num_prompt_tokens = len(spec.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_placeholders = 0
        # A prompt's scores are complete before the first token is chosen.
        is_new = spec.fork_of is None and not spec.output_token_ids
        wants_scores = spec.params.num_prompt_logprobs is not None and is_new
        self.num_scored_tokens = 0 if wants_scores else self.num_prompt_tokens - 1
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if wants_scores else None
        self.num_in_flight = 0
        self.drafts: tuple[int, ...] = ()
        self.drafts_in_flight = False
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None  # the user's stop id or string that ended it
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache when first admitted
        self.sent = False  # the runner knows the request
        self.arrival = -1  # order of Scheduler.add
        self.max_total_tokens = 0  # prompt + output tokens at which it stops for length; set by Scheduler.add

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def length(self) -> int:
        """Tokens of its sequence: `num_tokens`, but for beams, which keep their own."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens, those still to be chosen in flight included, that no step computes yet."""
        return len(self.token_ids) + self.num_placeholders - self.num_computed_tokens

    @property
    def generates(self) -> bool:
        """Whether tokens are to be chosen at all; with max_tokens 0 the request ends with its prompt."""
        return self.max_total_tokens > self.num_prompt_tokens

    @property
    def is_scored(self) -> bool:
        """Whether every log probability wanted of the prompt is computed, or will be by a step in flight."""
        return self.num_scored_tokens >= self.num_prompt_tokens - 1

    @property
    def can_step(self) -> bool:
        """Whether the next step may hold the request: its position is certain, and more tokens are wanted of it."""
        if not self.generates:
            return True
        return not self.drafts_in_flight and len(self.token_ids) + self.num_placeholders < self.max_total_tokens

    @property
    def num_rows(self) -> int:
        """Rows of a step, of the max_num_seqs, that the request may take."""
        return 1

    @property
    def table_ids(self) -> Sequence[str]:
        """Ids under which a running request holds blocks."""
        return (self.id,)

    @property
    def runner_ids(self) -> Sequence[str]:
        """Ids by which the runner knows the request."""
        return (self.id,) if self.sent else ()

    @property
    def answer_ids(self) -> Sequence[str]:
        """Ids under which its updates are reported, one an answer."""
        return (self.id,)

    def num_tokens_to_hold(self, block_size: int) -> int:
        """Tokens that the cache must hold before the next one can be chosen, in whole blocks but for the last."""
        return len(self.token_ids)

    def lose_tables(self) -> None:
        """Its blocks are gone: all its tokens must be computed again."""
        self.num_computed_tokens = 0
        self.drafts = ()

    def announcement(self) -> NewRequest:
        """What the runner is told, once."""
        return self.announcement_as(self.id)

    def announcement_as(self, runner_id: str) -> NewRequest:
        """The same under another id."""
        spec = self.spec
        return NewRequest(
            request_id=runner_id,
            prompt_token_ids=spec.prompt_token_ids,
            params=spec.params,
            seed=spec.seed,
            stop_token_ids=self.stop_token_ids,
            bad_words_token_ids=spec.bad_words_token_ids,
            output_token_ids=spec.output_token_ids,
        )

    def add_prompt_logprobs(self, entries: Sequence[TokenLogprobs]) -> tuple[TokenLogprobs, ...] | None:
        """Keep a step's entries; all of them, once, when these complete the prompt's."""
        if self.prompt_logprobs is None:
            return None
        self.prompt_logprobs.extend(entries)
        if len(self.prompt_logprobs) < self.num_prompt_tokens - 1:
            return None
        complete, self.prompt_logprobs = tuple(self.prompt_logprobs), None
        return complete

    def failure(self, message: str, answer_ids: Sequence[str] | None = None) -> list[RequestUpdate]:
        """The updates that report an error, one for each answer or for those given."""
        return [
            RequestUpdate(
                request_id=answer_id,
                new_token_ids=(),
                finish_reason="error",
                error=message,
                num_cached_tokens=self.num_cached_tokens,
            )
            for answer_id in (self.answer_ids if answer_ids is None else answer_ids)
        ]

    def append(self, new_token_ids: Sequence[int]) -> tuple[int, FinishReason | None, int | None]:
        """Append tokens up to the first that ends the request; return (how many, finish reason, stop reason).

        Stop ids do not stop among the first `min_tokens`. The stop reason is the user's stop id, None for the model's.
        """
        for count, token in enumerate(new_token_ids, start=1):
            self.token_ids.append(token)
            if token in self.stop_token_ids and self.num_output_tokens > self.spec.params.min_tokens:
                is_eos = token in self.spec.eos_token_ids and not self.spec.params.ignore_eos
                return count, "stop", None if is_eos else token
            if len(self.token_ids) >= self.max_total_tokens:
                return count, "length", None
        return len(new_token_ids), None, None
