"""A world in which every mistake of the scheduler or the cache is seen: a fake device whose slots remember what was
written to them, and a fake model whose next token is a hash of the whole history."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from paceline.config import CacheConfig, EngineConfig, KVGroup, SchedulerConfig, SpeculativeConfig
from paceline.engine.beam_request import BeamRequest
from paceline.engine.beams import BeamAnswer, BeamSearch
from paceline.engine.request import Request, RequestSpec
from paceline.engine.scheduler import Scheduler
from paceline.engine.step import PLACEHOLDER, ScheduledRequest, SchedulerOutput, StepOutput
from paceline.sampling.logprobs import Candidates, TokenLogprobs, num_candidates

VOCAB = 4  # few tokens, so that prefixes meet, drafts are sometimes right and stop ids come up


def history(namespace: str, token_ids: Sequence[int]) -> list[int]:
    """A hash of tokens 0..p for each p: what position p's key would depend on."""
    hashes, state = [], sum(namespace.encode())
    for token in token_ids:
        state = hash((state, token))
        hashes.append(state)
    return hashes


def next_token(state: int, seed: int) -> int:
    return (hash((state, seed)) >> 7) % VOCAB


def alone(spec: RequestSpec, max_model_len: int) -> tuple[list[int], str]:
    """The output tokens and finish reason that the request gets by itself, straight from the definition."""
    tokens, params, output = list(spec.prompt_token_ids), spec.params, []
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(spec.eos_token_ids))
    while params.max_tokens != 0:
        output.append(next_token(history(spec.namespace, tokens + output)[-1], spec.seed))
        if output[-1] in stops and len(output) > params.min_tokens:
            return output, "stop"
        if len(output) == params.max_tokens or len(tokens) + len(output) == max_model_len:
            return output, "length"
    return [], "length"


def beam_candidates(spec: RequestSpec, state: int, num_output: int) -> Candidates:
    """What stands for a beam's likeliest next tokens. Stop ids are masked until min_tokens are there."""
    stops = Request(spec).stop_token_ids
    masked = stops if num_output < spec.params.min_tokens else frozenset()
    logprobs = {t: -((hash((state, t)) >> 7) % 1000 + 1) / 300 for t in range(VOCAB) if t not in masked}
    ids = sorted(logprobs, key=lambda token: -logprobs[token])[: num_candidates(spec.params.width, len(stops))]
    values = tuple(logprobs[token] for token in ids)
    return Candidates(tuple(ids), values, values)


def beams_alone(spec: RequestSpec, max_model_len: int) -> tuple[list[BeamAnswer], list[list[list[int]]]]:
    """The answers that a beam request gets by itself, and the tokens of the beams before each step: the same search
    with nothing between it and the model."""
    limits = [max_model_len - len(spec.prompt_token_ids)]
    limits += [] if spec.params.max_tokens is None else [spec.params.max_tokens]
    search = BeamSearch(spec.params, Request(spec).stop_token_ids, min(limits))
    states = []
    while search.beams:
        states.append([[*spec.prompt_token_ids, *beam.token_ids] for beam in search.beams])
        ends = [history(spec.namespace, tokens)[-1] for tokens in states[-1]]
        search.advance([beam_candidates(spec, end, len(search.beams[0].token_ids)) for end in ends])
    return search.answers, states


def as_request(spec: RequestSpec) -> Request:
    return BeamRequest(spec) if spec.params.use_beam_search else Request(spec)


def score(hashes: Sequence[int], prompt: Sequence[int], position: int) -> TokenLogprobs:
    """What stands for the log probability of the prompt token after `position`: it depends on all up to there."""
    return TokenLogprobs(prompt[position + 1], float(hashes[position] % 1000), 1, {})


class Device:
    """Slots by (group, slot); requests by id, as a model runner would know them."""

    def __init__(self, groups: Sequence[KVGroup], num_blocks: Sequence[int], block_size: int) -> None:
        self.groups, self.num_blocks, self.block_size = groups, num_blocks, block_size
        self.slots: dict[tuple[int, int], int] = {}
        self.known: dict[str, list[int]] = {}
        self.specs: dict[str, RequestSpec] = {}
        self.forgotten = 0

    def run(self, output: SchedulerOutput, specs: dict[str, RequestSpec]) -> StepOutput:
        for request_id in output.finished:
            del self.known[request_id]  # KeyError: told twice, or of one it never knew
            self.forgotten += 1
        for new in output.new_requests:
            assert new.request_id not in self.known, "a request was announced twice"
            self.known[new.request_id] = list(new.prompt_token_ids)
            self.specs[new.request_id] = specs[new.request_id.removesuffix("#beam0")]
        parents = [(list(self.known[b.parent_id]), self.specs[b.parent_id]) for b in output.branches]
        for branch, (tokens, spec) in zip(output.branches, parents, strict=True):
            self.known[branch.request_id] = [*tokens, branch.token_id]
            self.specs[branch.request_id] = spec
        self._copy(output)
        ids = [r.request_id for r in output.scheduled]
        assert len(ids) == len(set(ids)), "a request is scheduled twice in a step"
        rows = [self._write(r) for r in output.scheduled]
        for scheduled, hashes in zip(output.scheduled, rows, strict=True):
            self._read(scheduled, hashes)
        together = list(zip(output.scheduled, rows, strict=True))
        choosing = [(r, h, self.specs[r.request_id].params.use_beam_search) for r, h in together if r.samples]
        return StepOutput(
            {r.request_id: self._sample(r, h) for r, h, is_beam in choosing if not is_beam},
            candidates={r.request_id: self._candidates(r, h) for r, h, is_beam in choosing if is_beam},
            prompt_logprobs={r.request_id: self._score(r, h) for r, h in together if r.scored},
        )

    def _candidates(self, scheduled: ScheduledRequest, hashes: list[int]) -> Candidates:
        spec = self.specs[scheduled.request_id]
        return beam_candidates(spec, hashes[-1], len(hashes) - len(spec.prompt_token_ids))

    def _score(self, scheduled: ScheduledRequest, hashes: list[int]) -> tuple[TokenLogprobs, ...]:
        assert scheduled.start <= scheduled.scored.start, "a position is scored that the step does not compute"
        prompt = self.specs[scheduled.request_id].prompt_token_ids
        return tuple(score(hashes, prompt, position) for position in scheduled.scored)

    def _copy(self, output: SchedulerOutput) -> None:
        size = self.block_size
        targets = {(c.group, c.target) for c in output.copies}
        assert len(targets) == len(output.copies), "two copies go to one block"
        read = [[self.slots.get((c.group, c.source * size + i)) for i in range(size)] for c in output.copies]
        for copy, values in zip(output.copies, read, strict=True):
            for i, value in enumerate(values):  # all reads came first; in order must give the same
                assert self.slots.get((copy.group, copy.source * size + i)) == value or copy.source == copy.target
            for i, value in enumerate(values):
                self.slots[copy.group, copy.target * size + i] = value

    def _slot(self, scheduled: ScheduledRequest, group: int, position: int) -> tuple[int, int]:
        block = scheduled.block_tables[group][position // self.block_size]
        assert 1 <= block <= self.num_blocks[group], "the null block is used"
        return group, block * self.block_size + position % self.block_size

    def _write(self, scheduled: ScheduledRequest) -> list[int]:
        """Write the step's slots; return the history hashes up to its last token."""
        known, tokens = self.known[scheduled.request_id], []
        assert scheduled.token_ids, "nothing to compute"
        num_known = len(scheduled.token_ids) - scheduled.num_drafts
        wants_tokens = self.specs[scheduled.request_id].params.max_tokens != 0
        last = scheduled.start + num_known == len(known)
        assert scheduled.samples == (wants_tokens and last), "`samples` is wrong"
        for i, token in enumerate(scheduled.token_ids):
            position = scheduled.start + i
            if i < num_known:
                assert token in (PLACEHOLDER, known[position]), "a wrong token for this position"
                assert token != PLACEHOLDER or len(scheduled.token_ids) == 1, "a placeholder beside other tokens"
                token = known[position]
            tokens.append(token)
        spec = self.specs[scheduled.request_id]
        hashes = history(spec.namespace, known[: scheduled.start] + tokens)
        for position in range(scheduled.start, len(hashes)):
            for group in range(len(self.groups)):
                self.slots[self._slot(scheduled, group, position)] = hashes[position]
        return hashes

    def _read(self, scheduled: ScheduledRequest, hashes: list[int]) -> None:
        for group, kv in enumerate(self.groups):
            first = 0 if kv.window is None else max(0, scheduled.start - kv.window + 1)
            for position in range(first, len(hashes)):
                content = self.slots.get(self._slot(scheduled, group, position))
                assert content == hashes[position], f"group {kv.name}: position {position} holds something else"

    def _sample(self, scheduled: ScheduledRequest, hashes: list[int]) -> tuple[int, ...]:
        drafts = scheduled.token_ids[len(scheduled.token_ids) - scheduled.num_drafts :]
        chosen, base = [], len(hashes) - 1 - len(drafts)
        for i in range(len(drafts) + 1):
            chosen.append(next_token(hashes[base + i], self.specs[scheduled.request_id].seed))
            if i == len(drafts) or drafts[i] != chosen[-1]:
                break
        self.known[scheduled.request_id].extend(chosen)
        return tuple(chosen)


@dataclass(frozen=True)
class Script:
    """`arrivals[i]`: the step at which specs[i] comes; `aborts[i]`: the step at which it is aborted, or None.
    `drafts`: how many tokens are proposed; `draft_errors`: one in so many is made wrong, 0 for never."""

    specs: tuple[RequestSpec, ...]
    arrivals: tuple[int, ...]
    aborts: tuple[int | None, ...]
    groups: tuple[KVGroup, ...]
    num_blocks: tuple[int, ...]
    block_size: int
    scheduler: SchedulerConfig
    prefix_caching: bool
    depth: int
    drafts: int = 0
    draft_errors: int = 0
    reset_at: int | None = None
    max_model_len: int = 64


class World:
    """Plays a script to its end and checks everything on the way."""

    def __init__(self, script: Script) -> None:
        self.script = script
        config = EngineConfig(
            max_model_len=script.max_model_len,
            cache=CacheConfig(block_size=script.block_size, enable_prefix_caching=script.prefix_caching),
            scheduler=script.scheduler,
            speculative=SpeculativeConfig(num_speculative_tokens=script.drafts) if script.drafts else None,
            async_depth=script.depth,
        )
        self.scheduler = Scheduler(config, script.groups, script.num_blocks)
        self.device = Device(script.groups, script.num_blocks, script.block_size)
        self.by_id = {spec.request_id: spec for spec in script.specs}
        self.specs = {answer: spec for spec in script.specs for answer in as_request(spec).answer_ids}
        self.outputs: dict[str, list[int]] = {answer: [] for answer in self.specs}
        self.scores: dict[str, float | None] = {}
        self.reasons: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.scored: set[str] = set()
        self.known_to_device: set[str] = set()
        self.queue: deque[tuple[SchedulerOutput, StepOutput]] = deque()

    def play(self) -> World:
        script, step = self.script, 0
        while self.scheduler.has_work or step <= max((*script.arrivals, 0)):
            self._events(step)
            output = self.scheduler.schedule()
            self._check_output(output)
            self.scheduler.check_invariants()
            result = self.device.run(output, self.by_id)
            if output.scheduled:
                self.queue.append((output, result))
            elif output.finished or not self.queue:
                self._take(output, result)
            if len(self.queue) > script.depth or (self.queue and not output.scheduled):
                self._take(*self.queue.popleft())
            self.scheduler.check_invariants()
            step += 1
            assert step < 3000, "no end in sight: a deadlock or a livelock"
        self._check_end()
        return self

    def _events(self, step: int) -> None:
        script = self.script
        for spec, arrival, abort in zip(script.specs, script.arrivals, script.aborts, strict=True):
            if arrival == step:
                self.scheduler.add(as_request(spec))
            if abort == step and self.scheduler.abort(spec.request_id):
                self.reasons |= dict.fromkeys(as_request(spec).answer_ids, "abort")
        if script.reset_at == step:
            self.scheduler.reset_prefix_cache()
        self.scheduler.check_invariants()

    def _check_output(self, output: SchedulerOutput) -> None:
        limits = self.script.scheduler
        assert output.num_tokens <= limits.max_num_batched_tokens, "over the token budget"
        for request in output.scheduled:
            if limits.max_chunk is not None:
                assert len(request.token_ids) - request.num_drafts <= limits.max_chunk, "over the chunk"
        self.known_to_device |= {new.request_id for new in output.new_requests}
        self.known_to_device |= {branch.request_id for branch in output.branches}

    def _take(self, output: SchedulerOutput, result: StepOutput) -> None:
        for update in self.scheduler.update(output, result):
            request_id = update.request_id
            assert request_id not in self.reasons, "a finished request is reported again"
            self.outputs[request_id] += update.new_token_ids
            if update.prompt_logprobs is not None:
                self._check_scores(self.specs[request_id], update.prompt_logprobs)
            leader = self.specs[request_id].fork_of
            if update.error is None and leader and self._is_scoring(leader):
                assert leader in self.scored, "an answer came before its prompt's log probabilities"
            self.cached[request_id] = update.num_cached_tokens
            self.scores[request_id] = update.score
            if update.finish_reason is not None:
                self.reasons[request_id] = update.finish_reason
            elif self.script.drafts:
                self.scheduler.set_drafts(request_id, self._drafts(request_id))

    def _is_scoring(self, request_id: str) -> bool:
        wanted = self.specs[request_id].params.num_prompt_logprobs is not None
        return wanted and request_id not in self.reasons

    def _check_scores(self, spec: RequestSpec, found: Sequence[TokenLogprobs]) -> None:
        assert spec.params.num_prompt_logprobs is not None, "log probabilities that nobody asked for"
        assert spec.fork_of is None, "an answer scores the prompt again"
        assert spec.request_id not in self.scored, "a prompt's log probabilities are reported twice"
        self.scored.add(spec.request_id)
        prompt = spec.prompt_token_ids
        hashes = history(spec.namespace, prompt)
        assert list(found) == [score(hashes, prompt, i) for i in range(len(prompt) - 1)], "wrong log probabilities"

    def _drafts(self, request_id: str) -> list[int]:
        spec = self.specs[request_id]
        tokens = [*spec.prompt_token_ids, *self.outputs[request_id]]
        drafts: list[int] = []
        for _ in range(self.script.drafts):
            state = history(spec.namespace, tokens + drafts)[-1]
            wrong = self.script.draft_errors and state % self.script.draft_errors == 0
            drafts.append((next_token(state, spec.seed) + bool(wrong)) % VOCAB)
        return drafts

    def _overflows(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens is too long for some pool, even alone."""
        size = self.script.block_size
        for group, blocks in zip(self.script.groups, self.script.num_blocks, strict=True):
            touched = {position // size for position in range(num_tokens)}
            if group.window is not None:  # the most blocks that one query's window touches
                touched = max(
                    ({p // size for p in range(max(0, q - group.window + 1), q + 1)} for q in range(num_tokens)),
                    key=len,
                )
            if len(touched) > blocks:
                return True
        return False

    def _check_end(self) -> None:
        script = self.script
        assert not self.device.known, "the device was not told that requests ended"
        assert self.device.forgotten == len(self.known_to_device)
        for spec in script.specs:
            if spec.params.use_beam_search:
                self._check_beams(spec)
                continue
            tokens, reason = alone(spec, script.max_model_len)
            got, why = self.outputs[spec.request_id], self.reasons[spec.request_id]
            if why in ("abort", "error"):
                assert got == tokens[: len(got)], "wrong tokens before the end"
                if why == "error":
                    assert self._overflows(len(spec.prompt_token_ids) + len(got) + 1), "failed without need"
            else:
                assert (got, why) == (tokens, reason), "not the tokens it gets alone"
                wanted = spec.params.num_prompt_logprobs is not None and spec.fork_of is None
                assert not wanted or spec.request_id in self.scored, "the prompt's log probabilities never came"
        assert set(self.scheduler.stats.cache.used_blocks) == {0}, "blocks were never given back"

    def _check_beams(self, spec: RequestSpec) -> None:
        answers, states = beams_alone(spec, self.script.max_model_len)
        ids = as_request(spec).answer_ids
        reasons = {self.reasons[request_id] for request_id in ids}
        if reasons == {"abort"} or (reasons == {"error"} and answers):
            assert reasons == {"abort"} or self._beams_overflow(states), "failed without need"
            return
        for rank, request_id in enumerate(ids):
            if rank < len(answers):
                answer = answers[rank]
                assert tuple(self.outputs[request_id]) == answer.beam.token_ids, "not the beam that it gets alone"
                assert self.scores[request_id] == answer.score
                assert self.reasons[request_id] == answer.finish_reason
            else:
                assert self.reasons[request_id] == "error", "an answer that does not exist"
        assert spec.params.num_prompt_logprobs is None or spec.request_id in self.scored, "no prompt_logprobs"

    def _beams_overflow(self, states: Sequence[Sequence[Sequence[int]]]) -> bool:
        """Whether the beams need more blocks at some step than a pool has. Beams share the blocks of common tokens but
        for the one being written. While a request is computed again, a window group may hold a block more a row."""
        size = self.script.block_size
        for group, blocks in zip(self.script.groups, self.script.num_blocks, strict=True):
            for beams in states:
                last = len(beams[0]) - 1
                first = 0 if group.window is None else max(0, last - group.window + 1) // size
                shared = {tuple(tokens[: (i + 1) * size]) for tokens in beams for i in range(first, last // size)}
                spare = 0 if group.window is None else len(beams)
                if len(shared) + len(beams) + spare > blocks:
                    return True
        return False


@pytest.fixture(scope="session")
def play():
    """play(**script fields) -> World, at its end."""

    def run(**fields: object) -> World:
        return World(Script(**fields)).play()  # type: ignore[arg-type]

    return run
