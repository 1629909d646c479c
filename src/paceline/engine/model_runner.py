"""Run one step on the device: copy blocks, build the inputs, forward, score prompts, sample, verify drafts.

The runner keeps what the device side must remember of a request (its tokens) and owns the cache's tensors; it
decides nothing that the scheduler has not decided. A step whose tokens follow from logits alone is only started, where
`decode` is there (engine/decode_step.py): the next one may be launched before it is collected. Any other needs the
tokens before it on the host, and is done when it is launched.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice

import numpy as np
import torch

from paceline.cache.kv_cache import allocate_kv, copy_block
from paceline.engine.decode_step import DecodeStep, Ends, PendingDecode, all_decode, fits
from paceline.engine.request_tokens import RequestTokens, begin
from paceline.engine.step import PLACEHOLDER, BlockCopy, Branch, ScheduledRequest, SchedulerOutput, StepOutput
from paceline.errors import is_out_of_memory
from paceline.inputs import KVLayer, ModelInputs
from paceline.kernels.attention_plan import build_attention
from paceline.kernels.decode_attention import decode_refusal
from paceline.log import get_logger
from paceline.models.model import Model
from paceline.sampling.candidates import find_candidates
from paceline.sampling.logprobs import Candidates, TokenLogprobs
from paceline.sampling.params import NO_TOKEN_LEFT
from paceline.sampling.sampler import NOT_FINITE, Sampled, SamplingRow, sample
from paceline.sampling.scoring import score_hidden
from paceline.speculative.verify import rows_with_drafts, verify
from paceline.transfer import send

log = get_logger(__name__)


@dataclass
class Launched:
    """A step that was started. `step`: its results, once they are known; else `pending` are the results to wait for, of
    `states` under `request_ids`."""

    step: StepOutput | None
    pending: PendingDecode | None = None
    request_ids: Sequence[str] = ()
    states: Sequence[RequestTokens] = ()

    @property
    def done(self) -> bool:
        return self.step is not None


class ModelRunner:
    """`num_blocks`: blocks of each KV group, the null block not counted. `decode`, given the cache, makes what runs
    plain decodes, and chooses behind prompts, on buffers of its own; None: every step is built anew. `deterministic`:
    attention adds up as if each request were alone (models/deterministic.py does the rest). `all_have_room`, where
    other ranks compute the same steps: whether the memory of each holds a decode of so many rows. They wait for this
    one's part of every step, so that none may be computed again without some of its requests."""

    def __init__(
        self,
        model: Model,
        num_blocks: Sequence[int],
        block_size: int,
        decode: Callable[[Sequence[KVLayer]], DecodeStep] | None = None,
        *,
        deterministic: bool = False,
        all_have_room: Callable[[int], bool] | None = None,
    ) -> None:
        self.model = model
        self._all_have_room = all_have_room
        self.block_size = block_size
        self.deterministic = deterministic
        self.windows = tuple(group.window for group in model.kv_groups)
        self.kv = allocate_kv(model.kv_groups, num_blocks, block_size, dtype=model.dtype, device=model.device)
        self.decode = None if decode is None else decode(self.kv)
        self._requests: dict[str, RequestTokens] = {}
        self._in_flight: deque[Launched] = deque()
        self._failed: set[str] = set()  # requests of which it was said; steps in flight may hold them still
        # Why a decode's attention needs a plan made on the host; None where a kernel finds its keys on the device.
        self.decode_refusal = next(
            filter(None, (decode_refusal(group.head_dim, model.dtype, model.device) for group in model.kv_groups)), None
        )
        self._padded = True  # whether a request may read, under a mask, slots that are not its own

    def run(self, output: SchedulerOutput) -> StepOutput:
        """Compute one step. A request whose logits are not finite comes back in `errors`; the others go on."""
        return self.collect(self.launch(output))

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> Launched:
        """Start one step; `collect` gives its results, which are those of `run`. Launched steps run in order."""
        for request_id in output.finished:
            self._requests.pop(request_id, None)
            self._failed.discard(request_id)
        for new in output.new_requests:
            self._requests[new.request_id] = begin(new)
        if not output.scheduled:
            return Launched(StepOutput({}))
        launched = self._launch_ahead(output)
        if launched is not None:
            return launched
        self._settle()
        self._branch(output.branches)
        self._copy(output.copies)
        return Launched(self._compute_or_fail(output.scheduled))

    def collect(self, launched: Launched) -> StepOutput:
        """The results of a step. Waits for it, and takes in those before it."""
        while launched.step is None:
            self._take_in(self._in_flight.popleft())
        return launched.step

    def _launch_ahead(self, output: SchedulerOutput) -> Launched | None:
        """Start a step whose tokens the device chooses alone; None, and nothing done, if it cannot, or if memory does
        not suffice."""
        scheduled = output.scheduled
        if self.decode is None or output.branches or sum(r.samples for r in scheduled) > self.decode.max_rows:
            return None
        states = [self._requests[request.request_id] for request in scheduled]
        if not fits(scheduled, states):
            return None
        if all_decode(scheduled):
            return self._launch_decode(self.decode, output, states)
        return self._launch_mixed(self.decode, output)

    def _launch_decode(
        self, decode: DecodeStep, output: SchedulerOutput, states: list[RequestTokens]
    ) -> Launched | None:
        if self._all_have_room is not None:
            rows = decode.new_rows(states)
            if rows is not None and not self._all_have_room(rows):
                decode.lower(len(states))
                return None
        self._copy(output.copies)  # a second time, where memory does not suffice, changes nothing
        try:
            pending = decode.launch(output.scheduled, states)
        except Exception as error:
            if not self._survives(error):
                raise
            decode.lower(len(states))
            return None
        return self._started(pending, output.scheduled, states)

    def _launch_mixed(self, decode: DecodeStep, output: SchedulerOutput) -> Launched | None:
        scheduled = _decodes_first(output.scheduled)
        self._copy(output.copies)  # as there
        ends = np.cumsum([len(request.token_ids) for request in scheduled])
        chosen = [index for index, request in enumerate(scheduled) if request.samples]
        choosing = [scheduled[index] for index in chosen]
        states = [self._requests[request.request_id] for request in choosing]
        positions = np.array([request.start + len(request.token_ids) for request in choosing], dtype=np.int64)
        try:
            inputs, unknown = self._inputs(scheduled)
            pending = decode.launch_mixed(inputs, unknown, Ends(states, ends[chosen] - 1, positions))
        except Exception as error:
            if not self._survives(error):
                raise
            return None
        return self._started(pending, choosing, states)

    def _started(
        self, pending: PendingDecode, choosing: Sequence[ScheduledRequest], states: Sequence[RequestTokens]
    ) -> Launched:
        launched = Launched(None, pending, [request.request_id for request in choosing], states)
        self._in_flight.append(launched)
        return launched

    def _settle(self) -> None:
        """Wait for all that is in flight, so that the host knows every token, and chooses the next."""
        while self._in_flight:
            self._take_in(self._in_flight.popleft())
        if self.decode is not None:
            self.decode.forget_rows()

    def _take_in(self, launched: Launched) -> None:
        assert launched.pending is not None, "a step without results is on its way"
        token_ids: dict[str, tuple[int, ...]] = {}
        errors: dict[str, str] = {}
        ids, fine = launched.pending.result()
        if all(fine):
            for state, token in zip(launched.states, ids, strict=True):
                state.output.append(token)
            # One of a request that ended meanwhile is there too: nobody looks for it.
            launched.step = StepOutput(dict(zip(launched.request_ids, zip(ids, strict=True), strict=True)))
            launched.pending, launched.states = None, ()
            return
        for request_id, state, token, is_fine in zip(launched.request_ids, launched.states, ids, fine, strict=True):
            if self._requests.get(request_id) is not state:
                continue  # it ended after this step was launched, and its id may be another's now
            state.output.append(token)  # of a failed one too: a step may hold it that does not know yet
            if is_fine:
                token_ids[request_id] = (token,)
            else:
                errors[request_id] = NOT_FINITE
                self._isolate(request_id, NOT_FINITE)
        launched.step, launched.pending, launched.states = StepOutput(token_ids, errors=errors), None, ()

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            copy_block(self.kv, copy.group, copy.source, copy.target, self.block_size)

    def _compute_or_fail(self, scheduled: Sequence[ScheduledRequest]) -> StepOutput:
        """A step for which memory does not suffice is computed again without its largest share, whose request fails."""
        try:
            return self._compute(scheduled)
        except Exception as error:
            if not self._survives(error):
                raise
            largest = max(scheduled, key=lambda request: len(request.token_ids))
        # Out here the error is gone, and with it the tensors that its traceback held.
        torch.cuda.empty_cache()
        message = (
            f"out of memory on {self.model.device} in a step of {sum(len(r.token_ids) for r in scheduled)} tokens, "
            f"{len(largest.token_ids)} of them this request's: lower max_num_batched_tokens, max_num_seqs or "
            "kv_cache_gib"
        )
        log.error("request %s failed: %s", largest.request_id, message)
        rest = [request for request in scheduled if request is not largest]
        step = self._compute_or_fail(rest) if rest else StepOutput({})
        return replace(step, errors={**step.errors, largest.request_id: message})

    def _survives(self, error: Exception) -> bool:
        """Whether a step that fails so may be computed in another way: not where other ranks compute it too."""
        return self._all_have_room is None and is_out_of_memory(error)

    def _compute(self, scheduled: Sequence[ScheduledRequest]) -> StepOutput:
        scheduled = _decodes_first(scheduled)
        inputs, _ = self._inputs(scheduled)
        hidden_TD = self.model(inputs, self.kv)
        # Sampling comes last: what is chosen is remembered at once, and no error may follow.
        prompt_logprobs = self._score_prompts(scheduled, hidden_TD)
        step = self._sample(scheduled, hidden_TD)
        return replace(step, prompt_logprobs=prompt_logprobs, errors=self._errors(step.errors, prompt_logprobs))

    def _branch(self, branches: Sequence[Branch]) -> None:
        parents = [self._requests[branch.parent_id] for branch in branches]
        for branch, parent in zip(branches, parents, strict=True):
            output = parent.output + array("q", (branch.token_id,))
            self._requests[branch.request_id] = replace(parent, output=output)

    def _inputs(self, scheduled: Sequence[ScheduledRequest]) -> tuple[ModelInputs, Sequence[tuple[int, RequestTokens]]]:
        """What the model is given, and which of its tokens, by their places, a step in flight chooses for whom."""
        query_starts = list(accumulate((len(request.token_ids) for request in scheduled), initial=0))
        tokens = chain.from_iterable(request.token_ids for request in scheduled)
        token_ids_T = np.fromiter(tokens, dtype=np.int64, count=query_starts[-1])
        # Each token's request, and its position there.
        requests_T = np.repeat(np.arange(len(scheduled)), np.diff(query_starts))
        offsets_R = np.array([request.start for request in scheduled]) - query_starts[:-1]
        positions_T = np.arange(len(token_ids_T)) + offsets_R[requests_T]
        unknown = []
        for token in np.flatnonzero(token_ids_T == PLACEHOLDER).tolist():
            state = self._requests[scheduled[requests_T[token]].request_id]
            if positions_T[token] < state.num_known:
                token_ids_T[token] = state.known(positions_T[token])
            else:
                unknown.append((token, state))
        attention = build_attention(
            query_starts,
            [request.start + len(request.token_ids) for request in scheduled],
            [[request.block_tables[group] for request in scheduled] for group in range(len(self.windows))],
            self.windows,
            block_size=self.block_size,
            device=self.model.device,
            padded=self._padded,
            on_device=self.decode_refusal is None,
            deterministic=self.deterministic,
        )
        device = self.model.device
        return ModelInputs(send(token_ids_T, device), send(positions_T, device), attention), unknown

    def _score_prompts(
        self, scheduled: Sequence[ScheduledRequest], hidden_TD: torch.Tensor
    ) -> dict[str, tuple[TokenLogprobs, ...]]:
        """The log probabilities of the prompt tokens that follow the rows to be scored, by request."""
        picked: list[int] = []  # rows of hidden_TD
        targets: list[int] = []
        num_top: list[int] = []
        end = 0
        for request in scheduled:
            first = end - request.start
            end += len(request.token_ids)
            if request.scored:
                state = self._requests[request.request_id]
                picked += [first + position for position in request.scored]
                targets += [state.prompt[position + 1] for position in request.scored]
                num_top += [state.new.params.num_prompt_logprobs or 0] * len(request.scored)
        if not picked:
            return {}
        rows = send(np.array(picked), hidden_TD.device)
        entries = iter(score_hidden(self.model.logits, hidden_TD[rows], self.model.vocab_size, targets, num_top))
        return {r.request_id: tuple(islice(entries, len(r.scored))) for r in scheduled if r.scored}

    def _errors(
        self, sampling: Mapping[str, str], prompt_logprobs: Mapping[str, tuple[TokenLogprobs, ...]]
    ) -> dict[str, str]:
        """What failed where tokens were chosen, and the requests whose prompt has logits that are not finite."""
        errors = dict(sampling)
        for request_id, entries in prompt_logprobs.items():
            if request_id not in errors and any(math.isnan(entry.logprob) for entry in entries):
                errors[request_id] = NOT_FINITE
                self._isolate(request_id, NOT_FINITE)
        return errors

    def _sample(self, scheduled: Sequence[ScheduledRequest], hidden_TD: torch.Tensor) -> StepOutput:
        """The last 1 + num_drafts rows of every request that samples choose tokens; drafts are kept as they agree."""
        ends = accumulate(len(request.token_ids) for request in scheduled)
        sampling = [(request, end) for request, end in zip(scheduled, ends, strict=True) if request.samples]
        sampling.sort(key=lambda one: self._is_beam(one[0]))  # stable: the beams come last
        choosing: list[tuple[ScheduledRequest, int]] = []  # and its first row
        picked: list[int] = []  # rows of hidden_TD
        rows: list[SamplingRow] = []
        beams: list[str] = []
        for request, end in sampling:
            if self._is_beam(request):
                beams.append(request.request_id)
            else:
                choosing.append((request, len(rows)))
            picked += range(end - 1 - request.num_drafts, end)
            rows += self._rows(request)
        if not rows:
            return StepOutput({})
        if picked != list(range(hidden_TD.shape[0])):
            hidden_TD = hidden_TD[send(np.array(picked), hidden_TD.device)]
        logits_RV = self.model.logits(hidden_TD)
        if not beams:
            return self._collect(choosing, sample(logits_RV, rows))
        first = len(rows) - len(beams)
        found = find_candidates(logits_RV[first:], rows[first:])
        return self._add_beams(self._collect(choosing, sample(logits_RV[:first], rows[:first])), beams, found)

    def _is_beam(self, request: ScheduledRequest) -> bool:
        return self._requests[request.request_id].new.params.use_beam_search

    def _add_beams(self, step: StepOutput, beams: Sequence[str], found: Sequence[Candidates | str]) -> StepOutput:
        errors = dict(step.errors)
        candidates: dict[str, Candidates] = {}
        for request_id, one in zip(beams, found, strict=True):
            if isinstance(one, Candidates):
                candidates[request_id] = one
            else:
                errors[request_id] = one
                self._isolate(request_id, one)
        return replace(step, errors=errors, candidates=candidates)

    def _rows(self, request: ScheduledRequest) -> list[SamplingRow]:
        state = self._requests[request.request_id]
        first = SamplingRow(
            params=state.new.params,
            seed=state.new.seed,
            position=state.num_known,
            prompt_token_ids=state.prompt,
            output_token_ids=state.output,
            stop_token_ids=state.new.stop_token_ids,
            bad_words_token_ids=state.new.bad_words_token_ids,
        )
        return rows_with_drafts(first, request.drafts)

    def _collect(self, choosing: Sequence[tuple[ScheduledRequest, int]], sampled: Sampled) -> StepOutput:
        token_ids: dict[str, tuple[int, ...]] = {}
        logprobs: dict[str, tuple[TokenLogprobs, ...]] = {}
        errors: dict[str, str] = {}
        for request, first in choosing:
            state = self._requests[request.request_id]
            chosen = verify(request.drafts, sampled.token_ids[first : first + 1 + request.num_drafts])
            failed = [sampled.errors[row] for row in range(first, first + len(chosen)) if row in sampled.errors]
            if failed:
                errors[request.request_id] = failed[0]
                self._isolate(request.request_id, failed[0])
                continue
            state.output.extend(chosen)
            token_ids[request.request_id] = tuple(chosen)
            if state.new.params.num_logprobs is not None:
                logprobs[request.request_id] = tuple(sampled.logprobs[first + i] for i in range(len(chosen)))
        return StepOutput(token_ids, logprobs, errors)

    def _isolate(self, request_id: str, message: str) -> None:
        """A failed request may leave NaN in the blocks it gives back. A masked read multiplies by zero, and zero
        times NaN is NaN, so from here on no request reads a slot that is not its own."""
        if request_id not in self._failed:
            self._failed.add(request_id)
            log.error("request %s failed: %s", request_id, message)
        # What a user's own parameters leave nothing of was finite: no request may slow the others down by asking.
        if self._padded and message != NO_TOKEN_LEFT:
            log.warning("from now on decodes run one by one, so that no other request reads the failed one's blocks")
            self._padded = False


def _decodes_first(scheduled: Sequence[ScheduledRequest]) -> list[ScheduledRequest]:
    """There they have a kernel of their own (kernels/varlen_attention.py)."""
    return sorted(scheduled, key=lambda request: len(request.token_ids) > 1)
