"""Continuous batching under one token budget: who computes which tokens in the next step. No torch.

There is no prefill and no decode phase: each request's num_computed_tokens catches up with its tokens. A chunk of a
prompt, a decode, a decode that verifies drafts and the recomputation after a preemption are the same thing, with other
numbers.

Asynchrony: schedule() may be called up to `async_depth` steps ahead of update(). Tokens not yet chosen are
PLACEHOLDER. A request that ends, or loses its blocks, while steps of it are in flight gives its blocks back at once;
that is safe because the device runs steps in order (cache/manager.py says why). A request whose drafts are in flight
is not scheduled again before their fate is known, and a preempted one not before its last step in flight came back.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.cache.manager import CacheManager, CacheStats
from paceline.config import EngineConfig, KVGroup
from paceline.engine.beam_request import BeamRequest
from paceline.engine.open_step import OpenStep, prompt_budget
from paceline.engine.queue import RequestQueue
from paceline.engine.request import Request, Status
from paceline.engine.step import (
    PLACEHOLDER,
    BlockCopy,
    FinishReason,
    RequestUpdate,
    ScheduledRequest,
    SchedulerOutput,
    StepOutput,
)
from paceline.errors import EngineError, PromptTooLongError, UsageError


@dataclass(frozen=True)
class SchedulerStats:
    num_running: int
    num_waiting: int
    num_preemptions: int
    num_drafts: int  # drafted tokens that were verified
    num_accepted_drafts: int
    cache: CacheStats


class Scheduler:
    """`num_blocks[g]`: blocks of KV group g, the null block not counted. Not thread-safe: one engine loop owns it.

    Outputs of schedule() come back to update() in order. One in which nothing is scheduled is no step in flight: it
    need not wait for those before it.
    """

    def __init__(self, config: EngineConfig, groups: tuple[KVGroup, ...], num_blocks: tuple[int, ...]) -> None:
        self.config = config
        self.cache = CacheManager(groups, num_blocks, config.cache)
        self._requests: dict[str, Request] = {}  # unfinished ones
        self._waiting = RequestQueue(config.scheduler.policy)
        self._running = RequestQueue(config.scheduler.policy)
        self._in_flight: deque[tuple[SchedulerOutput, list[Request]]] = deque()
        self._finished_ids: list[str] = []  # known to the runner, which is told with the next output
        self._failures: list[RequestUpdate] = []  # reported by the next update()
        self._arrivals = itertools.count()
        self.admitted: list[str] = []  # requests whose first step the last schedule() was
        self._num_preemptions = 0
        self._num_drafts = 0
        self._num_accepted_drafts = 0

    # --------------------------------------------------------------------------------- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request. UsageError: no tokens, an id in use, or more beams than rows; PromptTooLongError: it
        and one token cannot fit."""
        length, limit = request.num_prompt_tokens, self.config.max_model_len
        max_tokens = request.spec.params.max_tokens
        least = length if max_tokens == 0 else length + 1  # tokens that it has at its end, at least
        if request.id in self._requests:
            raise UsageError(f"request id '{request.id}' is in use by an unfinished request: choose another")
        if length == 0:
            raise UsageError(f"request '{request.id}' has an empty prompt: give at least one token")
        if request.num_rows > self.config.scheduler.max_num_seqs:
            raise UsageError(
                f"{request.num_rows} beams need as many sequences at once, and max_num_seqs is "
                f"{self.config.scheduler.max_num_seqs}: lower best_of (or n), or raise max_num_seqs"
            )
        if least > limit:
            raise PromptTooLongError(
                f"the prompt has {length} tokens, and with one more it exceeds max_model_len {limit}: shorten it, set "
                f"truncate_prompt_tokens, or raise max_model_len"
            )
        group = self.cache.too_small_group(least)
        if group is not None:
            raise PromptTooLongError(
                f"the prompt has {length} tokens, and the KV cache holds {self.cache.describe_group(group)}: "
                f"shorten it, or raise num_blocks"
            )
        request.max_total_tokens = limit if max_tokens is None else min(limit, length + max_tokens)
        request.arrival = next(self._arrivals)
        self._requests[request.id] = request
        self._waiting.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request at any time, steps in flight or not. False if no unfinished request has the id."""
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> bool:
        """End a request for a reason found elsewhere (a stop string, a disconnected client). No RequestUpdate follows:
        the caller knows. False if no unfinished request has the id."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, reason, stop_reason)
        return True

    def set_drafts(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Propose tokens to verify in the request's next step. Ignored where they could not be: the request has ended,
        generates nothing, is not at its last token, or has a step in flight, which may choose something else."""
        request = self._requests.get(request_id)
        if request is None or request.status is not Status.RUNNING or request.num_in_flight:
            return
        if request.generates and request.num_uncomputed_tokens == 1:
            request.drafts = tuple(token_ids)

    def _end(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        if request.status is Status.RUNNING:
            self._running.remove(request)
            self._free(request)
        else:
            self._waiting.remove(request)
        request.status = Status.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        del self._requests[request.id]
        self._finished_ids += request.runner_ids

    def _free(self, request: Request) -> None:
        for table_id in request.table_ids:
            self.cache.free(table_id)

    # ------------------------------------------------------------------------------------------- schedule

    def schedule(self) -> SchedulerOutput:
        """The next step. A PLACEHOLDER is always its request's only token.

        Nothing is scheduled when nothing can run before an update(), or nothing is left; `finished` carries each ended
        request that the runner knows, once. EngineError: more than async_depth steps in flight.
        """
        if len(self._in_flight) > self.config.async_depth:
            raise EngineError(
                f"{len(self._in_flight)} steps are in flight and async_depth is {self.config.async_depth}: "
                f"call update() first"
            )
        self.admitted = []
        most = self.config.scheduler.max_num_batched_tokens
        step = OpenStep(most, prompt_budget(most, self._running, self._waiting))
        self._schedule_running(step)
        if not step.preempted:  # blocks ran out: what is free now belongs to those who run
            self._schedule_waiting(step)
        output = SchedulerOutput(
            tuple(step.scheduled),
            tuple(step.new),
            tuple(step.copies),
            tuple(self._finished_ids),
            tuple(step.branches),
        )
        self._finished_ids.clear()
        if output.scheduled:
            self._in_flight.append((output, step.held))
        return output

    def _schedule_running(self, step: OpenStep) -> None:
        rows = 0
        for request in self._running:  # preemption takes from its end, and nothing else changes it
            if self._decode(step, request):
                rows += 1
                continue
            rows += request.num_rows
            # One token is kept for each row further back, so that a long prompt never stops others' decoding.
            while not self._advance(step, request, step.budget - (self._running.num_rows - rows)):
                last = self._running.last()
                if len(self._running) > 1:
                    self._preempt(last)
                    step.preempted = True
                elif request.num_in_flight == 0:  # else what is in flight may yet end it
                    self._fail_for_room(request)
                    return
                if last is request:
                    return

    def _decode(self, step: OpenStep, request: Request) -> bool:
        """The share of a request that computes its last token, in a block that it has: what nearly all of a large batch
        does. False, and nothing done, where there is more to it, which `_compute` then does: this does the same."""
        start, num_known = request.num_computed_tokens, len(request.token_ids)
        stop = start + 1
        if (
            stop != num_known + request.num_placeholders
            or stop >= request.max_total_tokens
            or request.drafts
            or request.drafts_in_flight
            or isinstance(request, BeamRequest)
        ):
            return False
        tables = self.cache.writable_tables(request.id, stop)
        if tables is None:
            return False
        tokens = (request.token_ids[start],) if start < num_known else (PLACEHOLDER,)
        step.put(request, ScheduledRequest(request.id, start, tokens, 0, True, tables))
        request.num_computed_tokens = stop
        request.num_placeholders += 1
        return True

    def _advance(self, step: OpenStep, request: Request, budget: int) -> bool:
        """Whether the request has what it can get of this step, which may be nothing; False if it lacks blocks."""
        return not request.can_step or request.num_uncomputed_tokens <= 0 or self._compute(step, request, budget)

    def _schedule_waiting(self, step: OpenStep) -> None:
        limit = self.config.scheduler.max_num_seqs
        index = 0
        while step.has_room and self._running.num_rows < limit and index < len(self._waiting):
            request = self._waiting[index]
            if request.num_in_flight or not request.can_step or self._waits_for_leader(step, request):
                index += 1
                continue
            if self._running.num_rows + request.num_rows > limit:
                return  # beams wait for rows, and nobody overtakes them
            if not self._admit(step, request):
                if self._running:
                    return
                self._fail_for_room(request)  # nobody holds a block, and still it does not fit

    def _admit(self, step: OpenStep, request: Request) -> bool:
        """Start or resume a waiting request; False, and nothing changed, if blocks are lacking."""
        start = self._open_table(request)
        # All its tokens must fit, not just the first chunk: else it would be preempted half-way, for nothing.
        num_tokens = request.num_tokens_to_hold(self.cache.block_size)
        if not self.cache.has_room_for_all(request.table_ids[0], num_tokens) or not self._compute(
            step, request, step.budget
        ):
            self._free(request)
            request.lose_tables()
            return False
        if request.status is Status.WAITING:
            request.num_cached_tokens = start
            self.cache.count_prefix(request.num_tokens, start)
        if not request.sent:
            request.sent = True
            self.admitted.append(request.id)
            step.new.append(request.announcement())
        self._waiting.remove(request)
        request.status = Status.RUNNING
        self._running.add(request)
        return True

    def _open_table(self, request: Request) -> int:
        """Open the table of a waiting request on what is computed already: a leader's prompt, or a cached prefix."""
        if isinstance(request, BeamRequest):
            return request.open_table(self.cache)
        leader = self._requests.get(request.spec.fork_of or "")
        start = request.num_prompt_tokens - 1
        forked = (
            leader is not None
            and leader.status is Status.RUNNING
            and request.status is Status.WAITING
            and self.cache.fork(leader.id, request.id, start)
        )
        if not forked:
            # What is still to be scored must be computed: a cached prefix has no logits.
            limit = None if request.is_scored else request.num_scored_tokens
            start = self.cache.begin(request.id, request.spec.namespace, request.token_ids, limit)
        request.num_computed_tokens = start
        return start

    def _waits_for_leader(self, step: OpenStep, request: Request) -> bool:
        """Whether sharing the leader's prompt is still to be expected. Not of one that was preempted: that would only
        delay the request, unless the leader has log probabilities to give that the request's echo begins with. What
        this very step computes cannot be shared yet: copies are made before it runs."""
        leader = self._requests.get(request.spec.fork_of or "")
        if leader is None or request.status is Status.PREEMPTED:
            return False
        if not leader.is_scored:
            return True
        if leader.status is Status.RUNNING:
            return step.starts.get(leader.id, leader.num_computed_tokens) < leader.num_prompt_tokens - 1
        return leader.status is Status.WAITING

    def _compute(self, step: OpenStep, request: Request, budget: int) -> bool:
        """Put the request into the step with as many tokens as budget, chunk and blocks allow; False if no block."""
        start = request.num_computed_tokens
        uncomputed = request.num_uncomputed_tokens
        if uncomputed > 1:
            budget = min(budget, step.prompt_budget)
            if budget == 0:
                return True
        if isinstance(request, BeamRequest):
            return self._compute_beams(step, request, budget)
        drafts = request.drafts[: request.max_total_tokens - request.num_tokens - 1]
        chunk = self.config.scheduler.max_chunk
        stop = start + min(uncomputed, budget, chunk or uncomputed)
        if drafts and stop == start + uncomputed:
            stop = min(stop + len(drafts), start + budget)
        copies = self.cache.allocate(request.id, start, stop)
        if copies is None:
            stop = self.cache.room(request.id, start, stop)
            copies = self.cache.allocate(request.id, start, stop) if stop > start else None
            if copies is None:
                return False
        num_drafts = max(0, stop - start - uncomputed)
        samples = request.generates and stop >= start + uncomputed
        scored = range(max(start, request.num_scored_tokens), min(stop, request.num_prompt_tokens - 1))
        scheduled = ScheduledRequest(
            request_id=request.id,
            start=start,
            token_ids=_tokens_of(request, start, stop, drafts[:num_drafts]),
            num_drafts=num_drafts,
            samples=samples,
            block_tables=self.cache.block_tables(request.id),
            scored=scored,
        )
        step.put(request, scheduled)
        step.starts[request.id] = start
        step.copies.extend([BlockCopy(*copy) for copy in copies])
        request.num_computed_tokens = stop
        request.num_scored_tokens += len(scored)
        request.drafts = ()
        request.drafts_in_flight = num_drafts > 0
        request.num_placeholders += samples
        return True

    def _compute_beams(self, step: OpenStep, request: BeamRequest, budget: int) -> bool:
        share = request.step(self.cache, budget, self.config.scheduler.max_chunk)
        if share is None:
            return False
        for scheduled in share.scheduled:
            step.put(request, scheduled)
        step.copies.extend([BlockCopy(*copy) for copy in share.copies])
        step.branches.extend(share.branches)
        return True

    def _preempt(self, request: Request) -> None:
        """Take all its blocks; its tokens stay, and are computed again when it is resumed."""
        self._running.remove(request)
        self._free(request)
        request.status = Status.PREEMPTED
        request.lose_tables()
        self._num_preemptions += 1
        self._waiting.add(request)

    def _fail_for_room(self, request: Request) -> None:
        length = request.num_tokens_to_hold(self.cache.block_size) + request.num_placeholders
        group = self.cache.too_small_group(length + 1) or 0
        beams, fewer = "", ""
        if isinstance(request, BeamRequest):
            beams, fewer = f" in each of {request.num_rows} beams", ", or the number of beams"
        message = (
            f"request '{request.id}' has {request.length} tokens{beams} and the KV cache holds no more: "
            f"{self.cache.describe_group(group)}; raise num_blocks, or lower max_tokens{fewer}"
        )
        self._failures += request.failure(message)
        self._end(request, "error")

    # --------------------------------------------------------------------------------------------- update

    def update(self, output: SchedulerOutput, step: StepOutput) -> list[RequestUpdate]:
        """Take in the results of the oldest step in flight; say what changed for which request.

        Prefill chunks that neither choose a token nor complete the prompt's log probabilities are not reported, nor
        are results of requests that have ended meanwhile.
        EngineError if `output` is not the oldest step in flight, or a request that samples got no token.
        """
        updates = self._failures
        self._failures = []
        if not output.scheduled:
            return updates
        if not self._in_flight or self._in_flight[0][0] is not output:
            raise EngineError("update() must get the outputs of schedule() in order, each once")
        _, held = self._in_flight.popleft()
        for scheduled, request in zip(output.scheduled, held, strict=True):
            request.num_in_flight -= 1
            if request.status is Status.FINISHED:
                continue
            if scheduled.request_id in step.errors:
                self._end(request, "error")
                updates += request.failure(step.errors[scheduled.request_id])
            elif isinstance(request, BeamRequest):
                updates += self._update_beams(request, scheduled, step)
            else:
                update = self._update_request(request, scheduled, step)
                if update is not None:
                    updates.append(update)
        return updates

    def _update_beams(self, request: BeamRequest, scheduled: ScheduledRequest, step: StepOutput) -> list[RequestUpdate]:
        candidates = step.candidates.get(scheduled.request_id)
        if scheduled.samples and candidates is None:
            raise EngineError(f"beam '{scheduled.request_id}' got no candidates")
        prompt_logprobs = step.prompt_logprobs.get(scheduled.request_id, ())
        if not request.take(self.cache, scheduled, candidates, prompt_logprobs):
            return []
        self._end(request, "stop")
        return request.answers()

    def _update_request(self, request: Request, scheduled: ScheduledRequest, step: StepOutput) -> RequestUpdate | None:
        new: tuple[int, ...] = ()
        count, reason, stop_reason, prompt_logprobs = 0, None, None, None
        if request.prompt_logprobs is not None:
            prompt_logprobs = request.add_prompt_logprobs(step.prompt_logprobs.get(request.id, ()))
        num_tokens = len(scheduled.token_ids)
        num_computed = scheduled.start + num_tokens
        if scheduled.samples:
            new = step.token_ids.get(request.id, ())
            if not 1 <= len(new) <= 1 + scheduled.num_drafts:
                raise EngineError(f"request '{request.id}' got {len(new)} tokens for {scheduled.num_drafts} drafts")
            rejected = scheduled.num_drafts + 1 - len(new)
            num_computed -= rejected
            self._num_drafts += scheduled.num_drafts
            self._num_accepted_drafts += scheduled.num_drafts - rejected
            request.num_placeholders -= 1
            request.drafts_in_flight = False
            if request.status is Status.RUNNING:  # else it was preempted: its tokens count, its blocks are gone
                request.num_computed_tokens -= rejected
            count, reason, stop_reason = request.append(new)
        elif not request.generates and num_computed == request.num_prompt_tokens:
            reason = "length"
        # A single token that fills no block commits none.
        if request.status is Status.RUNNING and (num_tokens > 1 or num_computed % self.cache.block_size == 0):
            self.cache.commit(request.id, request.token_ids, min(num_computed, len(request.token_ids)))
        if reason is not None:
            self._end(request, reason, stop_reason)
        if not scheduled.samples and prompt_logprobs is None and reason is None:
            return None
        logprobs = step.logprobs[request.id][:count] if request.id in step.logprobs else ()
        return RequestUpdate(
            request.id, new[:count], logprobs, reason, stop_reason, None, request.num_cached_tokens, prompt_logprobs
        )

    # ------------------------------------------------------------------------------------------ questions

    @property
    def has_unfinished(self) -> bool:
        """Whether some request has not ended, or ended with an error that the next update() reports."""
        return bool(self._requests or self._failures)

    @property
    def has_work(self) -> bool:
        """Whether schedule() and update() have anything left to do: requests, steps in flight, or ended requests of
        which the runner does not know yet (one more schedule() then gives an output that carries only `finished`)."""
        return bool(self._requests or self._failures or self._in_flight or self._finished_ids)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not yet updated."""
        return len(self._in_flight)

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            len(self._running),
            len(self._waiting),
            self._num_preemptions,
            self._num_drafts,
            self._num_accepted_drafts,
            self.cache.stats,
        )

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, for when the weights change."""
        self.cache.reset_prefix_cache()

    def check_invariants(self) -> None:
        """AssertionError unless the books agree; meant for tests, O(everything)."""
        self.cache.check_invariants()
        assert len(self._running) + len(self._waiting) == len(self._requests), "a request is in no queue, or in two"
        tables = [table_id for request in self._running for table_id in request.table_ids]
        assert sorted(self.cache.request_ids) == sorted(tables), "others than the running hold blocks"
        rows = sum(request.num_rows for request in self._running)
        assert rows == self._running.num_rows <= self.config.scheduler.max_num_seqs, "more rows than max_num_seqs"
        for request in self._requests.values():
            assert request.num_computed_tokens >= 0, "negative progress"
            assert request.num_placeholders <= request.num_in_flight, "a placeholder that no step will fill"
            assert request.num_tokens < request.max_total_tokens + (not request.generates), "it outlived its limit"
            if isinstance(request, BeamRequest):
                request.check_invariants()
            elif request.status is Status.RUNNING and not request.drafts_in_flight:
                assert request.num_uncomputed_tokens >= 0, "computed more tokens than there are"


def _tokens_of(request: Request, start: int, stop: int, drafts: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens at start..stop-1: known ones, then placeholders, then drafts."""
    known = tuple(request.token_ids[start:stop])
    missing = stop - start - len(known) - len(drafts)
    return known + (PLACEHOLDER,) * missing + drafts if missing or drafts else known
