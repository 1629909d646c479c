"""The engine: schedule, run, update, one step at a time. It knows token ids only; text is engine/output.py's."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.config import EngineConfig, KVGroup
from paceline.engine.beam_request import BeamRequest
from paceline.engine.request import Request, RequestSpec, child_id
from paceline.engine.scheduler import Scheduler
from paceline.engine.step import FinishReason, RequestUpdate, SchedulerOutput, StepOutput
from paceline.errors import PacelineError
from paceline.sampling.params import SamplingParams
from paceline.sampling.random import bits64
from paceline.speculative.ngram import NgramIndex


class Launched(Protocol):
    """A step that was started. `done`: its results are there."""

    @property
    def done(self) -> bool: ...


class Runner(Protocol):
    """What runs the steps: engine/model_runner.py here, engine/remote.py in other processes."""

    def launch(self, output: SchedulerOutput) -> Launched: ...

    def collect(self, launched: Any) -> StepOutput:
        """The results of a step that this runner launched, in the order of launching."""
        ...


@dataclass(frozen=True)
class EngineRequest:
    """A request as the engine takes it. `eos_token_ids`: the model's own end; `namespace` separates prefix caches.

    `sent_token_ids` resumes what an engine that is gone had begun, with the seed it reported: what each sampled answer
    has so far, or None for one that has ended. Beams, which report nothing before their end, begin anew.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    namespace: str = ""
    sent_token_ids: Sequence[Sequence[int] | None] = ()


def answer_ids(request_id: str, params: SamplingParams) -> list[str]:
    """The ids under which a request's answers are reported."""
    return [child_id(request_id, index, params.num_answers) for index in range(params.num_answers)]


class Engine:
    """Owns a scheduler and a runner. `step()` until `has_work` is false; requests may come and go between steps."""

    def __init__(
        self, config: EngineConfig, groups: tuple[KVGroup, ...], num_blocks: tuple[int, ...], runner: Runner
    ) -> None:
        self.config = config
        self.runner = runner
        self.scheduler = Scheduler(config, groups, num_blocks)
        self._in_flight: deque[tuple[SchedulerOutput, Launched]] = deque()
        self._proposers: dict[str, NgramIndex] = {}
        self._arrivals = 0
        self._failure: PacelineError | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add_request(self, request: EngineRequest) -> int:
        """Queue a request; returns the seed it samples with. Its updates are named by `answer_ids`.

        `params.width` sampled answers are as many requests of the scheduler's; the second and later ones share the
        first's prompt blocks. Beams are one. Raises PromptTooLongError when the cache could never hold it, UsageError
        for more beams than max_num_seqs.
        """
        self._arrivals += 1
        params = request.params
        seed = params.seed if params.seed is not None else bits64(self.config.seed, self._arrivals, stream=1)
        count = 1 if params.use_beam_search else params.width
        sent = request.sent_token_ids or ((),) * count
        for index in range(count):
            begun = () if params.use_beam_search else sent[index]
            if begun is None:
                continue
            spec = RequestSpec(
                child_id(request.request_id, index, count),
                request.prompt_token_ids,
                params,
                seed=seed if index == 0 else bits64(seed, index, stream=2),
                eos_token_ids=request.eos_token_ids,
                bad_words_token_ids=request.bad_words_token_ids,
                namespace=request.namespace,
                fork_of=None if index == 0 else child_id(request.request_id, 0, count),
                output_token_ids=begun,
            )
            self.scheduler.add(BeamRequest(spec) if params.use_beam_search else Request(spec))
            if not params.use_beam_search and self.config.speculative is not None:
                self._proposers[spec.request_id] = NgramIndex(
                    self.config.speculative, [*request.prompt_token_ids, *begun]
                )
        return seed

    def abort(self, request_id: str) -> None:
        """Forget a request and give its blocks back; unknown and finished ids are ignored. Sampled answers are named
        each, beams by their request's own id."""
        self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self.scheduler.finish(request_id, reason, stop_reason)
        self._proposers.pop(request_id, None)

    def step(self) -> list[RequestUpdate]:
        """Launch one step and return what changed: with async_depth d by the step d steps ago, or by this one where
        its results are there at once."""
        if self._failure is not None:
            raise self._failure
        output = self.scheduler.schedule()
        try:
            updates = self._run(output)
        except PacelineError as error:
            self._failure = error  # the runner's end: what is in flight is lost
            raise
        if self.config.speculative is not None:
            self._propose(updates)
        return updates

    def _run(self, output: SchedulerOutput) -> list[RequestUpdate]:
        self._in_flight.append((output, self.runner.launch(output)))
        updates: list[RequestUpdate] = []
        # A step that is done is taken in at once, with those before it, and so is one in which nothing could run.
        left = 0 if self._in_flight[-1][1].done else self.config.async_depth
        while len(self._in_flight) > left:
            output, launched = self._in_flight.popleft()
            updates += self.scheduler.update(output, self.runner.collect(launched))
        return updates

    def _propose(self, updates: Sequence[RequestUpdate]) -> None:
        for update in updates:
            proposer = self._proposers.get(update.request_id)
            if proposer is None:
                continue
            if update.finish_reason is not None:
                del self._proposers[update.request_id]
                continue
            proposer.extend(update.new_token_ids)
            self.scheduler.set_drafts(update.request_id, proposer.propose())
