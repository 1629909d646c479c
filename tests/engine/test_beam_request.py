"""How beams live in the scheduler, by example: rows, shared blocks, what a preemption keeps, what is refused."""

from __future__ import annotations

import random

import pytest

from paceline.config import CacheConfig, EngineConfig, KVGroup, SchedulerConfig
from paceline.engine.beam_request import BeamRequest
from paceline.engine.request import Request, RequestSpec, Status
from paceline.engine.scheduler import Scheduler
from paceline.engine.step import Branch, StepOutput
from paceline.errors import EngineError, UsageError
from paceline.sampling.logprobs import Candidates
from paceline.sampling.params import SamplingParams

FULL = KVGroup("full", (0,), None, 1, 1)
CLOSE, FAR = (-0.1, -0.2, -0.3, -9.9), (-0.1, -9.0, -9.5, -9.9)  # after CLOSE and FAR each beam has one child


def make(num_blocks=100, depth=0, block_size=4, caching=False, group=FULL, **scheduler):
    scheduler = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **scheduler}
    config = EngineConfig(
        max_model_len=1001,
        cache=CacheConfig(block_size=block_size, enable_prefix_caching=caching),
        scheduler=SchedulerConfig(**scheduler),
        async_depth=depth,
    )
    return Scheduler(config, (group,), (num_blocks,))


def add_beams(scheduler, request_id, prompt, width=3, n=1, **params):
    params = SamplingParams(use_beam_search=True, best_of=width, n=n, **{"max_tokens": 50, **params})
    scheduler.add(BeamRequest(RequestSpec(request_id, tuple(prompt), params)))


def add(scheduler, request_id, prompt, **params):
    scheduler.add(Request(RequestSpec(request_id, tuple(prompt), SamplingParams(**{"max_tokens": 50, **params}))))


def take(scheduler, output, logprobs=FAR):
    """update(): tokens 1, 2, 3, ... with `logprobs` for each beam that samples, token 1 for other requests."""
    is_beam = {r.request_id: "#beam" in r.request_id for r in output.scheduled if r.samples}
    one = Candidates(tuple(range(1, len(logprobs) + 1)), tuple(logprobs), tuple(logprobs))
    result = StepOutput(
        {request_id: (1,) for request_id, beam in is_beam.items() if not beam},
        candidates={request_id: one for request_id, beam in is_beam.items() if beam},
    )
    updates = scheduler.update(output, result)
    scheduler.check_invariants()
    return updates


def step(scheduler, logprobs=FAR):
    output = scheduler.schedule()
    scheduler.check_invariants()
    return output, take(scheduler, output, logprobs)


def used(scheduler):
    return scheduler.cache.stats.used_blocks[0]


def test_the_prompt_is_computed_once_and_then_a_row_a_beam():
    scheduler = make()
    add_beams(scheduler, "a", range(10))
    outputs = [step(scheduler, CLOSE)[0] for _ in range(2)]
    assert [len(output.scheduled) for output in outputs] == [1, 3]
    assert [(r.request_id, r.start, r.token_ids) for r in outputs[1].scheduled] == [
        ("a#beam0", 10, (1,)),
        ("a#beam1", 10, (2,)),
        ("a#beam2", 10, (3,)),
    ]
    assert [new.request_id for new in outputs[0].new_requests] == ["a#beam0"]
    assert outputs[1].branches == tuple(Branch(f"a#beam{i}", "a#beam0", i + 1) for i in range(3))


def test_only_the_last_block_is_copied_and_not_for_its_last_holder():
    """10 tokens in blocks of 4: three beams share 3 blocks, and two of them copy the third, half full."""
    scheduler = make()
    add_beams(scheduler, "a", range(10))
    step(scheduler, CLOSE)
    assert used(scheduler) == 3
    output, _ = step(scheduler)
    assert len(output.copies) == 2
    assert used(scheduler) == 5
    tables = [r.block_tables[0] for r in output.scheduled]
    assert len({table[:2] for table in tables}) == 1
    assert len({table[2] for table in tables}) == 3


def test_an_only_child_takes_the_table_over():
    """Every beam goes on in its best token: no copy, and the same block tables."""
    scheduler = make()
    add_beams(scheduler, "a", range(8))
    step(scheduler, CLOSE)
    output, _ = step(scheduler)
    before = [r.block_tables[0] for r in output.scheduled]
    assert output.copies == ()
    output, _ = step(scheduler)
    assert output.copies == ()
    assert [r.block_tables[0] for r in output.scheduled] == before


def test_beams_without_children_give_their_blocks_back_at_once():
    """The best beam has all three children: one table with its own block remains, and the others' are free."""
    scheduler = make()
    add_beams(scheduler, "a", range(8))
    step(scheduler, (-0.1, -8.0, -9.0, -9.5))
    output = scheduler.schedule()
    assert used(scheduler) == 2 + 3
    take(scheduler, output, (-0.1, -0.2, -0.3))
    assert used(scheduler) == 2 + 1
    assert len(scheduler.cache.request_ids) == 3


def test_what_leaves_a_window_is_free_before_the_first_beam_needs_a_block():
    """The prompt's 4 blocks fill the pool. Its last one and three new ones are the 4 that three beams need."""
    scheduler = make(num_blocks=4, group=KVGroup("window", (0,), 4, 1, 1))
    add_beams(scheduler, "a", range(16))
    step(scheduler, CLOSE)
    assert used(scheduler) == 4
    output, updates = step(scheduler)
    assert len(output.scheduled) == 3
    assert updates == []


@pytest.mark.parametrize("prompt", [16, 500])
def test_eight_beams_at_a_thousand_tokens_hold_less_than_half(prompt):
    """Of what 8 separate sequences hold. After a prompt of one block nearly all of it is due to common ancestors.

    Every beam's candidates are drawn alike, so all beams soon descend from one: lineages meet after some tens of steps.
    """
    scheduler = make(num_blocks=600, block_size=16)
    add_beams(scheduler, "a", range(prompt), width=8, max_tokens=1000 - prompt)
    draw = random.Random(4).uniform
    held = []
    while True:
        output = scheduler.schedule()
        length = output.scheduled[0].start + len(output.scheduled[0].token_ids)
        held.append((length, used(scheduler) / (8 * -(-length // 16))))
        chosen = {r.request_id: drawn_candidates(draw) for r in output.scheduled if r.samples}
        if scheduler.update(output, StepOutput({}, candidates=chosen)):
            break
    assert held[-1][0] == 999
    assert held[-1][1] < 0.45  # of Kwon et al. 2023: beam search saves up to 55% of the memory
    assert max(share for length, share in held if length > max(prompt, 100)) < 0.6


def drawn_candidates(draw):
    values = tuple(sorted((-draw(0.1, 6) for _ in range(16)), reverse=True))
    return Candidates(tuple(range(16)), values, values)


def test_blocks_are_free_when_the_search_ends_and_the_runner_is_told():
    scheduler = make()
    add_beams(scheduler, "a", range(8), width=2, n=2, max_tokens=2)
    step(scheduler, CLOSE)
    _, updates = step(scheduler)
    assert [(u.request_id, u.new_token_ids, u.finish_reason) for u in updates] == [
        ("a#0", (1, 1), "length"),
        ("a#1", (2, 1), "length"),
    ]
    assert [u.score for u in updates] == pytest.approx([-0.1, -0.15])
    assert [u.cumulative_logprob for u in updates] == pytest.approx([-0.2, -0.3])
    assert used(scheduler) == 0
    assert scheduler.schedule().finished == ("a#beam0", "a#beam1")
    assert not scheduler.has_work


def test_the_prefix_cache_keeps_the_prompt_and_no_branch():
    scheduler = make(caching=True)
    add_beams(scheduler, "a", range(10), width=2, max_tokens=20)
    for _ in range(20):
        _, updates = step(scheduler, CLOSE)
    (best,) = updates
    add(scheduler, "b", (*range(10), *best.new_token_ids))
    assert step(scheduler)[0].scheduled[0].start == 8


def test_a_stop_token_of_the_user_is_named():
    scheduler = make()
    add_beams(scheduler, "a", range(8), width=2, stop_token_ids=[1], early_stopping=True)
    step(scheduler)
    _, (update,) = step(scheduler)
    assert (update.request_id, update.new_token_ids, update.stop_reason) == ("a", (1,), 1)


def test_answers_that_do_not_exist_are_errors():
    scheduler = make()
    add_beams(scheduler, "a", range(8), width=3, n=3, max_tokens=1)
    _, updates = step(scheduler, (-0.1, -0.2))
    assert [u.finish_reason for u in updates] == ["length", "length", "error"]
    assert "found 2 of 3 answers" in updates[2].error


def test_more_beams_than_rows_are_refused():
    scheduler = make(max_num_seqs=2)
    with pytest.raises(UsageError, match=r"3 beams need as many .* max_num_seqs is 2: lower best_of"):
        add_beams(scheduler, "a", range(8))


def test_beams_wait_for_rows_and_nobody_overtakes_them():
    scheduler = make(max_num_seqs=4)
    for name in ("a", "b"):
        add(scheduler, name, range(4), max_tokens=2 if name == "a" else 50)
    add_beams(scheduler, "c", range(4))
    add(scheduler, "d", range(4))
    assert [r.request_id for r in step(scheduler)[0].scheduled] == ["a", "b"]
    assert [r.request_id for r in step(scheduler)[0].scheduled] == ["a", "b"]  # which ends a
    assert [r.request_id for r in step(scheduler)[0].scheduled] == ["b", "c#beam0"]
    assert [r.request_id for r in step(scheduler)[0].scheduled] == ["b", "c#beam0", "c#beam1", "c#beam2"]


def test_a_long_prompt_leaves_a_token_for_each_beam():
    scheduler = make(max_num_seqs=4, max_num_batched_tokens=8, policy="priority")
    add_beams(scheduler, "late", range(4), priority=1)
    step(scheduler)
    add(scheduler, "urgent", range(40), priority=0)
    step(scheduler)
    assert [len(r.token_ids) for r in step(scheduler)[0].scheduled] == [5, 1, 1, 1]


def test_nothing_is_scheduled_ahead_of_a_choice():
    scheduler = make(depth=2)
    add_beams(scheduler, "a", range(8))
    add(scheduler, "b", range(4))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [r.request_id for r in second.scheduled] == ["b"]
    assert scheduler.stats.num_preemptions == 0
    take(scheduler, first)
    assert len(scheduler.schedule().scheduled) == 4


def test_a_preempted_request_shares_its_blocks_again():
    """After a preemption no token that beams have in common is computed twice, and they hold the blocks they held."""
    scheduler = make(num_blocks=9, policy="priority")
    add_beams(scheduler, "a", range(8), priority=1)
    for logprobs in (CLOSE, CLOSE, FAR):
        step(scheduler, logprobs)
    request = scheduler._requests["a"]
    before = used(scheduler)
    add(scheduler, "b", range((9 - before) * 4 - 1), priority=0, max_tokens=4)
    for _ in range(10):
        step(scheduler)
        if request.status is Status.PREEMPTED:
            break
    tokens = [row.beam.token_ids for row in request._rows]
    computed, peak = 0, 0
    for _ in range(20):
        output = scheduler.schedule()
        computed += sum(len(r.token_ids) for r in output.scheduled if r.request_id != "b")
        peak = used(scheduler)
        if any(r.samples for r in output.scheduled if r.request_id != "b"):
            break
        take(scheduler, output)
    assert [row.beam.token_ids for row in request._rows] == tokens
    distinct = {(*range(8), *path[:i]) for path in tokens for i in range(len(path) + 1)}
    assert computed == 7 + len(distinct)
    whole = {
        path[: (i + 1) * 4] for path in ((*range(8), *path) for path in tokens) for i in range((len(path) - 1) // 4)
    }
    assert peak == len(whole) + 3


def test_a_copy_for_a_step_that_never_came_is_forgotten():
    """One block is left for two copies: the request is preempted between them. When it is computed again, the block
    that the first copy went to may be another's."""
    scheduler = make(num_blocks=8, policy="priority")
    add(scheduler, "b", range(13), priority=0, max_tokens=3)
    add_beams(scheduler, "a", range(10), priority=1)
    step(scheduler, CLOSE)
    assert used(scheduler) == 7
    step(scheduler)
    assert scheduler.stats.num_preemptions == 1
    for _ in range(5):
        output, _ = step(scheduler)
        if any(r.request_id != "b" for r in output.scheduled):
            break
    assert [(r.request_id, r.start) for r in output.scheduled] == [("a#beam0", 0)]
    assert output.copies == ()


def test_a_preempted_request_comes_back_when_all_its_beams_fit():
    """Three beams of 7 tokens, 4 of them in common, need 13 blocks of one token; there are fewer, but more than 7."""
    scheduler = make(num_blocks=20, block_size=1)
    add(scheduler, "b", range(5))
    add_beams(scheduler, "a", range(4))
    for logprobs in (CLOSE, FAR, FAR):
        step(scheduler, logprobs)
    scheduler._preempt(scheduler._requests["a"])
    output, _ = step(scheduler)
    assert [r.request_id for r in output.scheduled] == ["b"]
    assert 7 < 20 - used(scheduler) < 13
    scheduler.abort("b")
    assert [r.request_id for r in step(scheduler)[0].scheduled] == ["a#beam0"]


def test_a_cached_prefix_is_used_up_to_where_a_beam_branches_off():
    """Another request has put the first beam's whole path into the prefix cache."""
    scheduler = make(block_size=1, caching=True)
    add_beams(scheduler, "a", range(4))
    add(scheduler, "b", (*range(4), 1, 1, 1, 1, 1), max_tokens=1)
    for logprobs in (CLOSE, FAR, FAR):
        step(scheduler, logprobs)
    request = scheduler._requests["a"]
    assert [row.beam.token_ids for row in request._rows] == [(1, 1, 1), (2, 1, 1), (3, 1, 1)]
    scheduler._preempt(request)
    shared = []
    for _ in range(3):
        output, _ = step(scheduler)
        shared.append([(r.start, len(r.token_ids)) for r in output.scheduled])
    assert shared == [[(4, 2)] * 3, [(6, 1)] * 3, [(7, 1)] * 3]


def test_a_request_that_outgrows_the_cache_fails_in_all_its_answers():
    scheduler = make(num_blocks=4)
    add_beams(scheduler, "a", range(10), width=3, n=2)
    updates = []
    for _ in range(10):
        updates += step(scheduler, CLOSE)[1]
    assert [(u.request_id, u.finish_reason) for u in updates] == [("a#0", "error"), ("a#1", "error")]
    assert "in each of 3 beams and the KV cache holds no more: 16 tokens" in updates[0].error
    assert "or the number of beams" in updates[0].error


def test_an_error_in_one_beam_fails_the_request():
    scheduler = make()
    add_beams(scheduler, "a", range(10), n=2)
    step(scheduler)
    output = scheduler.schedule()
    one = Candidates((1,), (-0.1,), (-0.1,))
    updates = scheduler.update(output, StepOutput({}, errors={"a#beam1": "not finite"}, candidates={"a#beam0": one}))
    assert [(u.request_id, u.error) for u in updates] == [("a#0", "not finite"), ("a#1", "not finite")]
    assert used(scheduler) == 0


def test_a_beam_without_candidates_is_the_runners_mistake():
    scheduler = make()
    add_beams(scheduler, "a", range(10))
    with pytest.raises(EngineError, match="'a#beam0' got no candidates"):
        scheduler.update(scheduler.schedule(), StepOutput({}))


def test_aborting_gives_every_block_back():
    scheduler = make()
    add_beams(scheduler, "a", range(10), n=2)
    step(scheduler)
    assert scheduler.abort("a")
    assert used(scheduler) == 0
    assert scheduler.schedule().finished == ("a#beam0",)  # the branches were never sent
    assert not scheduler.has_work
