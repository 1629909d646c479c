"""A request for beams as the scheduler holds it: one entry of a queue, with a row of the step and a block table a beam.

The prompt is computed once, by one row. After each step the next beams are chosen (beams.py) and the block tables
follow: a beam's first child takes over its row and its table, every other child shares the table by reference, and a
beam without children gives its blocks back at once. Shared blocks are full and never written again, but for the last:
who writes to that one while others hold it copies it (cache/manager.py).

A preempted request keeps its beams' tokens, and computes them again with the same sharing: the first beam alone up to
where another one branches off, and so on. So its need of blocks is what it was.

Only the prompt's blocks enter the prefix tree: branches that died would push out prefixes that may be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.cache.manager import CacheManager, Copy
from paceline.engine.beams import Beam, BeamAnswer, BeamSearch
from paceline.engine.request import Request, RequestSpec, Status, child_id
from paceline.engine.step import Branch, NewRequest, RequestUpdate, ScheduledRequest
from paceline.sampling.logprobs import Candidates, TokenLogprobs


class _Row:
    """A live beam and how far it is computed. Without a block table it waits until `parent`, a row before it, has
    computed exactly the `fork_at` tokens that the two have in common."""

    __slots__ = ("beam", "fork_at", "has_table", "id", "num_computed_tokens", "parent")

    def __init__(self, row_id: str, beam: Beam) -> None:
        self.id = row_id
        self.beam = beam
        self.num_computed_tokens = 0
        self.has_table = False
        self.parent: _Row | None = None
        self.fork_at = 0


@dataclass(frozen=True)
class BeamStep:
    """A request's share of a step: its rows, the block copies to make before, and what the runner must know before."""

    scheduled: tuple[ScheduledRequest, ...]
    copies: tuple[Copy, ...]
    branches: tuple[Branch, ...]


class BeamRequest(Request):
    """`spec.params.use_beam_search` is set. `token_ids` stays the prompt; the rows have the beams' tokens.

    All rows choose in one step; until its result is known the request takes part in no other.
    """

    __slots__ = ("_branches", "_candidates", "_copies", "_known", "_prompt_logprobs", "_rows", "_search")

    def __init__(self, spec: RequestSpec) -> None:
        super().__init__(spec)
        self._rows = [_Row(self._row_id(0), Beam())]  # best first, as BeamSearch.beams
        self._search: BeamSearch | None = None  # made with the first choice: the longest length is known by then
        self._candidates: dict[str, Candidates] = {}  # of the rows whose share of that step came back
        self._copies: list[Copy] = []  # for blocks allocated to a step that is not complete yet
        self._branches: tuple[Branch, ...] = ()  # not told to the runner yet
        self._known: list[str] = []  # rows that the runner knows
        self._prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # once complete; told with the first answer

    def _row_id(self, index: int) -> str:
        return f"{self.id}#beam{index}"

    # --------------------------------------------------------------------- what the scheduler asks any request

    @property
    def num_rows(self) -> int:
        return self.spec.params.width

    @property
    def length(self) -> int:
        """Tokens of each beam, the prompt's included."""
        return self.num_prompt_tokens + len(self._rows[0].beam.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """None while a step in flight chooses, which is why no other step holds the request then."""
        return max(self.length - row.num_computed_tokens for row in self._rows)

    @property
    def table_ids(self) -> Sequence[str]:
        return [row.id for row in self._rows if row.has_table]

    @property
    def runner_ids(self) -> Sequence[str]:
        return self._known

    @property
    def answer_ids(self) -> Sequence[str]:
        n = self.spec.params.n
        return [child_id(self.id, index, n) for index in range(n)]

    def announcement(self) -> NewRequest:
        """The first row's: the others are made known as its branches."""
        self._known.append(self._rows[0].id)
        return self.announcement_as(self._rows[0].id)

    def num_tokens_to_hold(self, block_size: int) -> int:
        """The first row's tokens, and of each other row the blocks that it does not share."""
        own = [-(-self.length // block_size) - row.fork_at // block_size for row in self._rows[1:]]
        return self.length + sum(own) * block_size

    def open_table(self, cache: CacheManager) -> int:
        """Open the first row's table on its longest cached prefix that no other row branches off; its length."""
        row = self._rows[0]
        limit = min(self._limit(row), self.length - 1)
        if not self.is_scored:  # what is still to be scored must be computed: a cached prefix has no logits
            limit = min(limit, self.num_scored_tokens)
        tokens = self._tokens(row, 0, self.length)
        row.num_computed_tokens = cache.begin(row.id, self.spec.namespace, tokens, limit)
        row.has_table = True
        return row.num_computed_tokens

    def lose_tables(self) -> None:
        """All blocks are gone: plan how the rows will share them when they are computed again."""
        for row in self._rows:
            row.has_table = False
            row.num_computed_tokens = 0
        self._copies.clear()
        self._plan_sharing()

    # ------------------------------------------------------------------------------------------------ scheduling

    def step(self, cache: CacheManager, budget: int, max_chunk: int | None) -> BeamStep | None:
        """The request's share of the next step, of at most `budget` tokens; None if blocks are lacking.

        Rows that are behind catch up; once all stand at their last token, they choose. That takes a budget of num_rows.
        """
        self._open_tables(cache)
        stands = all(row.has_table and row.num_computed_tokens == self.length - 1 for row in self._rows)
        scheduled = self._choose(cache) if stands else self._catch_up(cache, budget, max_chunk)
        if not scheduled:
            return None
        self._known += [branch.request_id for branch in self._branches if branch.request_id not in self._known]
        result = BeamStep(tuple(scheduled), tuple(self._copies), self._branches)
        self._copies, self._branches = [], ()
        return result

    def _choose(self, cache: CacheManager) -> list[ScheduledRequest]:
        """One token a row, or nothing if not all of them get their block."""
        last = self.length - 1
        for row in self._rows:
            copies = cache.allocate(row.id, last, last + 1)
            if copies is None:
                return []
            self._copies += copies
        return [self._schedule(cache, row, last + 1) for row in self._rows]

    def _catch_up(self, cache: CacheManager, budget: int, max_chunk: int | None) -> list[ScheduledRequest]:
        scheduled: list[ScheduledRequest] = []
        for row in self._rows:
            start = row.num_computed_tokens
            stop = min(self._limit(row), start + min(budget, max_chunk or budget))
            if not row.has_table or stop <= start:
                continue
            copies = cache.allocate(row.id, start, stop)
            if copies is None:
                stop = cache.room(row.id, start, stop)
                copies = cache.allocate(row.id, start, stop) if stop > start else None
                if copies is None:
                    continue
            self._copies += copies
            budget -= stop - start
            scheduled.append(self._schedule(cache, row, stop))
        return scheduled

    def _limit(self, row: _Row) -> int:
        """Tokens of the row that may be computed for now. Of several rows none chooses before all of them can, and
        none passes a place where a row without a table branches off: a window could drop what that one sees."""
        if len(self._rows) == 1:
            return self.length
        forks = [other.fork_at for other in self._rows if other.parent is row and not other.has_table]
        return min([self.length - 1, *forks])

    def _schedule(self, cache: CacheManager, row: _Row, stop: int) -> ScheduledRequest:
        start, row.num_computed_tokens = row.num_computed_tokens, stop
        scored = range(max(start, self.num_scored_tokens), min(stop, self.num_prompt_tokens - 1))
        self.num_scored_tokens += len(scored)
        return ScheduledRequest(
            request_id=row.id,
            start=start,
            token_ids=self._tokens(row, start, stop),
            num_drafts=0,
            samples=stop == self.length,
            block_tables=cache.block_tables(row.id),
            scored=scored,
        )

    def _tokens(self, row: _Row, start: int, stop: int) -> tuple[int, ...]:
        prompt = self.num_prompt_tokens
        own = row.beam.token_ids[max(0, start - prompt) : max(0, stop - prompt)]
        return (*self.token_ids[start:stop], *own)

    # ---------------------------------------------------------------------------------------------- sharing blocks

    def _plan_sharing(self) -> None:
        """Let each row branch off the earlier one with which it has most tokens in common."""
        for index, row in enumerate(self._rows):
            row.parent, row.fork_at = None, 0
            for other in self._rows[:index]:
                common = self.num_prompt_tokens + _common(row.beam.token_ids, other.beam.token_ids)
                if common > row.fork_at:  # of equals the first, which then is no branch of the others
                    row.parent, row.fork_at = other, common

    def _open_tables(self, cache: CacheManager) -> None:
        for row in self._rows:
            parent = row.parent
            if not row.has_table and parent is not None and parent.num_computed_tokens == row.fork_at:
                self._share_table(cache, parent, row)

    def _share_table(self, cache: CacheManager, parent: _Row, row: _Row) -> None:
        row.num_computed_tokens = parent.num_computed_tokens
        row.has_table = cache.fork(parent.id, row.id, row.num_computed_tokens)
        assert row.has_table, "a window dropped what the row sees, although its parent stands where it begins"

    # ----------------------------------------------------------------------------------------------------- results

    def take(
        self,
        cache: CacheManager,
        scheduled: ScheduledRequest,
        candidates: Candidates | None,
        prompt_logprobs: Sequence[TokenLogprobs],
    ) -> bool:
        """Take in one row's share of a step; with the last row's, go on to the next beams. True when the search has
        ended. `candidates`: of a row that samples; `prompt_logprobs`: of `scheduled.scored`."""
        complete = self.add_prompt_logprobs(prompt_logprobs)
        if complete is not None:
            self._prompt_logprobs = complete
        if self.status is Status.RUNNING:
            computed = scheduled.start + len(scheduled.token_ids)
            cache.commit(scheduled.request_id, self.token_ids, min(computed, self.num_prompt_tokens))
        if candidates is None:
            return False
        self._candidates[scheduled.request_id] = candidates
        if len(self._candidates) < len(self._rows):
            return False
        if self._search is None:
            max_tokens = self.max_total_tokens - self.num_prompt_tokens
            self._search = BeamSearch(self.spec.params, self.stop_token_ids, max_tokens)
        parents = self._search.advance([self._candidates[row.id] for row in self._rows])
        self._candidates.clear()
        if parents:
            self._follow(cache, [self._rows[parent] for parent in parents], self._search.beams)
        return not parents

    def _follow(self, cache: CacheManager, parents: Sequence[_Row], beams: Sequence[Beam]) -> None:
        """Make the rows of the new beams out of those of their parents."""
        living = {parent.id for parent in parents}
        for row in self._rows:
            if row.has_table and row.id not in living:
                cache.free(row.id)
        unused = [row_id for row_id in map(self._row_id, range(self.num_rows)) if row_id not in living]
        rows: list[_Row] = []
        for parent, beam in zip(parents, beams, strict=True):
            inherits = parent.id in living
            living.discard(parent.id)
            row = _Row(parent.id if inherits else unused.pop(0), beam)
            if parent.has_table and inherits:
                row.num_computed_tokens, row.has_table = parent.num_computed_tokens, True
            elif parent.has_table:
                self._share_table(cache, parent, row)
            rows.append(row)
        self._branches = tuple(
            Branch(row.id, parent.id, row.beam.token_ids[-1]) for row, parent in zip(rows, parents, strict=True)
        )
        self._rows = rows
        if self.status is not Status.RUNNING:
            self._plan_sharing()

    def answers(self) -> list[RequestUpdate]:
        """The n best answers, best first, once the search has ended. Fewer may exist: the rest are errors."""
        found = [] if self._search is None else self._search.answers
        ids = self.answer_ids
        updates = [self._answer(index, *one) for index, one in enumerate(zip(ids, found, strict=False))]
        error = (
            f"beam search found {len(found)} of {len(ids)} answers: what allowed_token_ids, bad_words, logit_bias, "
            "max_tokens and the vocabulary allow makes no more sequences; loosen them, or lower n"
        )
        return updates + self.failure(error, ids[len(found) :])

    def _answer(self, index: int, request_id: str, answer: BeamAnswer) -> RequestUpdate:
        last = answer.beam.token_ids[-1]
        by_model = last in self.spec.eos_token_ids and not self.spec.params.ignore_eos
        return RequestUpdate(
            request_id=request_id,
            new_token_ids=answer.beam.token_ids,
            logprobs=answer.beam.entries,
            finish_reason=answer.finish_reason,
            stop_reason=None if answer.finish_reason == "length" or by_model else last,
            num_cached_tokens=self.num_cached_tokens,
            score=answer.score,
            cumulative_logprob=answer.beam.raw_logprob,
            prompt_logprobs=self._prompt_logprobs if index == 0 else None,
        )

    def check_invariants(self) -> None:
        """AssertionError unless the rows agree with each other and with the request's status."""
        ids = [row.id for row in self._rows]
        assert 1 <= len(ids) == len(set(ids)) <= self.num_rows, "a row is lost, or two share an id"
        assert self._rows[0].has_table == (self.status is Status.RUNNING), "the first row must have a table to run"
        choosing = all(row.num_computed_tokens == self.length for row in self._rows)
        for row in self._rows:
            assert len(row.beam.token_ids) == self.length - self.num_prompt_tokens, "beams differ in length"
            assert choosing or row.num_computed_tokens <= self._limit(row), "a row was computed too far"
            assert row.has_table or row.num_computed_tokens == 0, "computed tokens lie in no block"
            waits = row.parent is not None or row is self._rows[0]
            assert row.has_table or waits, "a row waits for nothing"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two sequences of equal length have in common from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
