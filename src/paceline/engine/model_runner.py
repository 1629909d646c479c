"""Run one step on the device: copy blocks, build the inputs, forward, score prompts, sample, verify drafts.

The runner keeps what the device side must remember of a request (its tokens) and owns the cache's tensors; it
decides nothing that the scheduler has not decided.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice

import torch

from paceline.cache.kv_cache import allocate_kv, copy_block
from paceline.engine.step import PLACEHOLDER, Branch, NewRequest, ScheduledRequest, SchedulerOutput, StepOutput
from paceline.inputs import ModelInputs
from paceline.kernels.attention_plan import build_attention
from paceline.kernels.decode_attention import decode_refusal
from paceline.log import get_logger
from paceline.models.model import Model
from paceline.sampling.candidates import find_candidates
from paceline.sampling.logprobs import Candidates, TokenLogprobs
from paceline.sampling.sampler import NOT_FINITE, Sampled, SamplingRow, sample
from paceline.sampling.scoring import score_hidden
from paceline.speculative.verify import rows_with_drafts, verify

log = get_logger(__name__)


@dataclass(frozen=True)
class RequestTokens:
    """A request and its tokens, which grow. Arrays, because the sampler's penalties read them as buffers."""

    new: NewRequest
    prompt: array[int]
    output: array[int]

    def known(self, position: int) -> int:
        """The token at a position that an earlier step has chosen."""
        prompt_length = len(self.prompt)
        return self.prompt[position] if position < prompt_length else self.output[position - prompt_length]


class ModelRunner:
    """`num_blocks`: blocks of each KV group, the null block not counted."""

    def __init__(self, model: Model, num_blocks: Sequence[int], block_size: int) -> None:
        self.model = model
        self.block_size = block_size
        self.windows = tuple(group.window for group in model.kv_groups)
        self.kv = allocate_kv(model.kv_groups, num_blocks, block_size, dtype=model.dtype, device=model.device)
        self._requests: dict[str, RequestTokens] = {}
        # Why a decode's attention needs a plan made on the host; None where a kernel finds its keys on the device.
        self.decode_refusal = next(
            filter(None, (decode_refusal(group.head_dim, model.dtype, model.device) for group in model.kv_groups)), None
        )
        self._padded = True  # whether a request may read, under a mask, slots that are not its own

    @torch.inference_mode()
    def run(self, output: SchedulerOutput) -> StepOutput:
        """Compute one step. A request whose logits are not finite comes back in `errors`; the others go on."""
        for request_id in output.finished:
            self._requests.pop(request_id, None)
        for new in output.new_requests:
            self._requests[new.request_id] = RequestTokens(new, array("q", new.prompt_token_ids), array("q"))
        self._branch(output.branches)
        for copy in output.copies:
            copy_block(self.kv, copy.group, copy.source, copy.target, self.block_size)
        if not output.scheduled:
            return StepOutput({})
        hidden_TD = self.model(self._inputs(output.scheduled), self.kv)
        step = self._sample(output.scheduled, hidden_TD)
        prompt_logprobs = self._score_prompts(output.scheduled, hidden_TD)
        return replace(step, prompt_logprobs=prompt_logprobs, errors=self._errors(step.errors, prompt_logprobs))

    def _branch(self, branches: Sequence[Branch]) -> None:
        parents = [self._requests[branch.parent_id] for branch in branches]
        for branch, parent in zip(branches, parents, strict=True):
            output = parent.output + array("q", (branch.token_id,))
            self._requests[branch.request_id] = RequestTokens(parent.new, parent.prompt, output)

    def _inputs(self, scheduled: Sequence[ScheduledRequest]) -> ModelInputs:
        token_ids: list[int] = []
        positions: list[int] = []
        query_starts = [0]
        for request in scheduled:
            known = self._requests[request.request_id].known
            for position, token in enumerate(request.token_ids, start=request.start):
                token_ids.append(known(position) if token == PLACEHOLDER else token)
                positions.append(position)
            query_starts.append(len(token_ids))
        attention = build_attention(
            query_starts,
            [request.start + len(request.token_ids) for request in scheduled],
            [[request.block_tables[group] for request in scheduled] for group in range(len(self.windows))],
            self.windows,
            block_size=self.block_size,
            device=self.model.device,
            padded=self._padded,
            on_device=self.decode_refusal is None,
        )
        device = self.model.device
        return ModelInputs(torch.tensor(token_ids, device=device), torch.tensor(positions, device=device), attention)

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
        rows = torch.tensor(picked, device=hidden_TD.device)
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
            hidden_TD = hidden_TD[torch.tensor(picked, device=hidden_TD.device)]
        logits_RV = self.model.logits(hidden_TD)
        if not beams:
            return self._collect(choosing, sample(logits_RV, rows))
        first = len(rows) - len(beams)
        step = self._collect(choosing, sample(logits_RV[:first], rows[:first]))
        return self._add_beams(step, beams, find_candidates(logits_RV[first:], rows[first:]))

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
            position=len(state.prompt) + len(state.output),
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
        log.error("request %s failed: %s", request_id, message)
        if self._padded:
            log.warning("from now on decodes run one by one, so that no other request reads the failed one's blocks")
            self._padded = False
