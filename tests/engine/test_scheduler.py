"""Single decisions of the scheduler, by example; tests/property plays whole lives."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paceline.config import CacheConfig, EngineConfig, KVGroup, SchedulerConfig
from paceline.engine.request import Request, RequestSpec
from paceline.engine.scheduler import Scheduler
from paceline.engine.step import PLACEHOLDER, BlockCopy, StepOutput, TokenLogprobs
from paceline.errors import EngineError, PromptTooLongError, UsageError
from paceline.sampling.params import SamplingParams

FULL = KVGroup("full", (0,), None, 1, 1)


def make(num_blocks=100, depth=0, max_model_len=1000, groups=(FULL,), block_size=4, **scheduler):
    scheduler = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **scheduler}
    config = EngineConfig(
        max_model_len=max_model_len,
        cache=CacheConfig(block_size=block_size),
        scheduler=SchedulerConfig(**scheduler),
        async_depth=depth,
    )
    return Scheduler(config, groups, (num_blocks,) * len(groups))


def add(scheduler, request_id, prompt, fork_of=None, seed=0, **params):
    params.setdefault("max_tokens", 50)
    scheduler.add(Request(RequestSpec(request_id, tuple(prompt), SamplingParams(**params), seed=seed, fork_of=fork_of)))


def answer(scheduler, output, token=1, **step):
    """update() with `token` for every request that samples."""
    tokens = {r.request_id: (token,) for r in output.scheduled if r.samples}
    updates = scheduler.update(output, StepOutput(tokens | step.pop("tokens", {}), **step))
    scheduler.check_invariants()
    return {update.request_id: update for update in updates}


def shares(output):
    """(id, start, number of tokens) of each scheduled request."""
    return [(r.request_id, r.start, len(r.token_ids)) for r in output.scheduled]


def step(scheduler, **kwargs):
    output = scheduler.schedule()
    return shares(output), answer(scheduler, output, **kwargs)


def test_prompts_are_cut_to_the_budget_and_decodes_go_first():
    scheduler = make(max_num_batched_tokens=10)
    add(scheduler, "a", range(6))
    add(scheduler, "b", range(10, 20))
    assert step(scheduler)[0] == [("a", 0, 6), ("b", 0, 4)]
    assert step(scheduler)[0] == [("a", 6, 1), ("b", 4, 6)]
    assert step(scheduler)[0] == [("a", 7, 1), ("b", 10, 1)]


def test_prompts_take_small_steps_while_others_decode_and_few_wait():
    scheduler = make(num_blocks=2000, max_num_batched_tokens=2000, max_model_len=4000)
    add(scheduler, "a", range(1800))
    assert step(scheduler)[0] == [("a", 0, 1800)]  # nobody waits for a step of its own
    add(scheduler, "b", range(5000, 5700))
    add(scheduler, "c", range(6000, 6300))
    add(scheduler, "d", range(7000, 7100))
    assert step(scheduler)[0] == [("a", 1800, 1), ("b", 0, 512)]
    assert step(scheduler)[0] == [("a", 1801, 1), ("b", 512, 188), ("c", 0, 300), ("d", 0, 24)]
    assert step(scheduler)[0] == [("a", 1802, 1), ("b", 700, 1), ("c", 300, 1), ("d", 24, 76)]


def test_prompts_take_large_steps_while_more_of_them_wait_than_a_step_takes():
    scheduler = make(num_blocks=4000, max_num_batched_tokens=2000, max_model_len=4000)
    add(scheduler, "a", range(10))
    step(scheduler)
    for name, begin in (("b", 5000), ("c", 7000)):
        add(scheduler, name, range(begin, begin + 1001))
    assert step(scheduler)[0] == [("a", 10, 1), ("b", 0, 1001), ("c", 0, 998)]
    assert step(scheduler)[0] == [("a", 11, 1), ("b", 1001, 1), ("c", 998, 3)]


def test_a_prompt_that_gets_nothing_of_a_small_step_waits():
    scheduler = make(num_blocks=2000, max_num_batched_tokens=700, max_chunk=256)
    add(scheduler, "a", range(10))
    step(scheduler)
    for name in ("b", "c", "d"):
        add(scheduler, name, range(ord(name) * 1000, ord(name) * 1000 + 600))
    assert step(scheduler)[0] == [("a", 10, 1), ("b", 0, 256), ("c", 0, 256), ("d", 0, 187)]
    assert step(scheduler)[0] == [("a", 11, 1), ("b", 256, 256), ("c", 256, 256)]
    add(scheduler, "e", range(5000, 5300))
    add(scheduler, "f", range(6000, 6008))
    assert step(scheduler)[0] == [("a", 12, 1), ("b", 512, 88), ("c", 512, 88), ("d", 187, 256), ("e", 0, 80)]
    assert (scheduler.num_running, scheduler.num_waiting) == (5, 1)  # "f" holds no block


def test_drafts_are_not_counted_as_prompts():
    scheduler = make(num_blocks=2000, max_num_batched_tokens=2000, max_model_len=4000)
    add(scheduler, "a", range(10), max_tokens=1000)
    step(scheduler)
    scheduler.set_drafts("a", [1] * 700)
    add(scheduler, "b", range(5000, 5513))
    assert step(scheduler, tokens={"a": (1,)})[0] == [("a", 10, 701), ("b", 0, 512)]


def test_a_chunk_is_not_longer_than_max_chunk_and_only_the_last_one_samples():
    scheduler = make(max_chunk=4)
    add(scheduler, "a", range(10))
    outputs = []
    for _ in range(3):
        output = scheduler.schedule()
        outputs.append((shares(output)[0][2], output.scheduled[0].samples, sorted(answer(scheduler, output))))
    assert outputs == [(4, False, []), (4, False, []), (2, True, ["a"])]


def test_a_long_prompt_never_starves_a_running_request():
    scheduler = make(max_num_seqs=2, max_num_batched_tokens=8, policy="priority")
    add(scheduler, "late", [1, 2], priority=1)
    step(scheduler)
    add(scheduler, "urgent", range(100), priority=0)
    step(scheduler)
    assert step(scheduler)[0] == [("urgent", 7, 7), ("late", 3, 1)]


def test_max_num_seqs_bounds_who_runs():
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        add(scheduler, name, [1, 2])
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "abc"), ("priority", "cba")])
def test_policies(policy, order):
    scheduler = make(policy=policy, max_num_seqs=1)
    for name, priority in zip("abc", (2, 1, 0), strict=True):
        add(scheduler, name, [1, 2], priority=priority, max_tokens=1)
    assert [step(scheduler)[0][0][0] for _ in range(3)] == list(order)


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", "b"), ("priority", "a")])
def test_the_least_important_is_preempted_and_comes_back_first(policy, victim):
    scheduler = make(num_blocks=4, policy=policy)
    add(scheduler, "a", range(7), priority=1)
    add(scheduler, "b", range(10, 17), priority=0)
    while scheduler.stats.num_preemptions == 0:
        step(scheduler)
    assert [r.id for r in scheduler._waiting] == [victim]
    survivor = "b" if victim == "a" else "a"
    add(scheduler, "c", [1])
    scheduler.abort(survivor)
    ids = [share[0] for share in step(scheduler)[0]]
    assert ids == ([victim, "c"] if policy == "fcfs" else ["c", victim])


def test_blocks_freed_by_a_preemption_are_left_to_those_who_run():
    scheduler = make(num_blocks=4, policy="priority", max_num_seqs=2)
    for name, length, priority in (("a", 7, 0), ("b", 7, 2)):
        add(scheduler, name, range(length), priority=priority)
    step(scheduler)
    add(scheduler, "c", [1], priority=1)
    while scheduler.stats.num_preemptions == 0:
        shared = step(scheduler)[0]
    assert [share[0] for share in shared] == ["a"]
    assert [share[0] for share in step(scheduler)[0]] == ["a", "c"]


def test_a_prompt_is_started_only_if_all_of_it_fits_now():
    scheduler = make(num_blocks=4, max_chunk=4)
    add(scheduler, "a", range(4), max_tokens=4)
    add(scheduler, "b", range(10, 24), max_tokens=1)
    while "a" in scheduler._requests:
        assert [share[0] for share in step(scheduler)[0]] == ["a"]
    assert step(scheduler)[0] == [("b", 0, 4)]
    assert scheduler.stats.num_preemptions == 0


def test_a_request_preempted_with_steps_in_flight_keeps_their_tokens_and_waits_for_them():
    scheduler = make(num_blocks=4, depth=2)
    add(scheduler, "a", range(7))
    add(scheduler, "b", range(10, 17))
    first, second, third = (scheduler.schedule() for _ in range(3))
    assert [shares(output)[-1] for output in (second, third)] == [("b", 7, 1), ("a", 8, 1)]  # "a" needs a third block
    answer(scheduler, first, tokens={"b": (3,)})
    scheduler.abort("a")
    assert shares(scheduler.schedule()) == []
    answer(scheduler, second, tokens={"b": (4,)})
    resumed = scheduler.schedule().scheduled[0]
    assert (resumed.request_id, resumed.start + len(resumed.token_ids)) == ("b", 9)
    assert resumed.token_ids[-2:] == (3, 4)


def test_a_request_preempted_with_drafts_in_flight_resumes_from_the_accepted_ones():
    scheduler = make(num_blocks=5, depth=2)
    add(scheduler, "a", range(6))
    add(scheduler, "b", range(10, 16))
    answer(scheduler, scheduler.schedule())
    scheduler.set_drafts("b", [5, 6, 7])
    outputs = [scheduler.schedule() for _ in range(3)]
    assert [shares(output) for output in outputs] == [[("a", 6, 1), ("b", 6, 4)], [("a", 7, 1)], [("a", 8, 1)]]
    answer(scheduler, outputs[0], tokens={"b": (5, 9)})
    scheduler.abort("a")
    resumed = scheduler.schedule().scheduled[0]
    assert (resumed.request_id, resumed.start + len(resumed.token_ids)) == ("b", 9)
    assert resumed.token_ids[-3:] == (1, 5, 9)


def test_a_prefix_hit_skips_its_blocks_and_is_reported():
    scheduler = make()
    add(scheduler, "a", range(9), max_tokens=1)
    assert step(scheduler)[1]["a"].num_cached_tokens == 0
    add(scheduler, "b", [*range(8), 30, 31], max_tokens=1)
    scheduled, updates = step(scheduler)
    assert scheduled == [("b", 8, 2)]
    assert updates["b"].num_cached_tokens == 8
    assert scheduler.stats.cache.prefix_query_tokens == 19
    assert scheduler.stats.cache.prefix_hit_tokens == 8


def test_children_wait_for_their_leader_then_share_its_prompt():
    scheduler = make(max_chunk=4)
    for child in range(3):
        add(scheduler, f"a#{child}", range(6), fork_of="a#0" if child else None)
    assert step(scheduler)[0] == [("a#0", 0, 4)]
    assert step(scheduler)[0] == [("a#0", 4, 2)]
    output = scheduler.schedule()
    assert shares(output) == [("a#0", 6, 1), ("a#1", 5, 1), ("a#2", 5, 1)]
    assert output.copies == (BlockCopy(0, 2, 3), BlockCopy(0, 2, 4))
    assert answer(scheduler, output)["a#2"].num_cached_tokens == 5


def test_a_child_goes_on_by_itself_when_its_leader_is_gone():
    scheduler = make(max_chunk=4)
    add(scheduler, "a#0", range(6))
    add(scheduler, "a#1", range(6), fork_of="a#0")
    step(scheduler)
    scheduler.abort("a#0")
    assert step(scheduler)[0] == [("a#1", 4, 2)]  # what the leader did compute is in the prefix cache


def test_drafts_are_verified_and_the_rejected_ones_rolled_back():
    scheduler = make()
    add(scheduler, "a", range(6))
    step(scheduler)
    scheduler.set_drafts("a", [7, 8, 9])
    output = scheduler.schedule()
    assert (output.scheduled[0].token_ids, output.scheduled[0].num_drafts) == ((1, 7, 8, 9), 3)
    assert answer(scheduler, output, tokens={"a": (7, 5)})["a"].new_token_ids == (7, 5)
    assert step(scheduler)[0] == [("a", 8, 1)]


def test_drafts_never_pass_the_length_limit_and_tokens_after_a_stop_are_cut():
    scheduler = make()
    add(scheduler, "a", range(6), max_tokens=4, stop_token_ids=[7])
    step(scheduler)
    scheduler.set_drafts("a", [5, 7, 8, 9, 9])
    output = scheduler.schedule()
    assert output.scheduled[0].token_ids == (1, 5, 7)
    logprobs = tuple(TokenLogprobs(t, 0.0, 1, {}) for t in (5, 7, 8))
    update = answer(scheduler, output, tokens={"a": (5, 7, 8)}, logprobs={"a": logprobs})["a"]
    assert (update.new_token_ids, update.finish_reason, update.stop_reason) == ((5, 7), "stop", 7)
    assert [entry.token_id for entry in update.logprobs] == [5, 7]


def test_drafts_are_ignored_with_a_step_in_flight_or_an_unfinished_prompt():
    scheduler = make(depth=1, max_chunk=4)
    add(scheduler, "a", range(6))
    answer(scheduler, scheduler.schedule())
    scheduler.set_drafts("a", [1])  # two prompt tokens are still to come
    prompt_end = scheduler.schedule()
    assert prompt_end.scheduled[0].num_drafts == 0
    scheduler.set_drafts("a", [1])
    decode = scheduler.schedule()
    assert decode.scheduled[0].token_ids == (PLACEHOLDER,)


def test_drafts_in_flight_hold_the_request_back():
    scheduler = make(depth=1)
    add(scheduler, "a", range(6))
    answer(scheduler, scheduler.schedule())
    scheduler.set_drafts("a", [1, 1])
    drafts = scheduler.schedule()
    assert shares(scheduler.schedule()) == []
    answer(scheduler, drafts)
    assert step(scheduler)[0] == [("a", 7, 1)]


def test_steps_ahead_compute_placeholders_but_not_past_the_length_limit():
    scheduler = make(depth=2)
    add(scheduler, "a", range(3), max_tokens=2)
    first, second, third = (scheduler.schedule() for _ in range(3))
    assert [o.scheduled[0].token_ids if o.scheduled else () for o in (first, second, third)] == [
        (0, 1, 2),
        (PLACEHOLDER,),
        (),
    ]
    answer(scheduler, first)
    assert answer(scheduler, second)["a"].finish_reason == "length"


def test_results_in_flight_of_a_request_that_stopped_are_discarded():
    scheduler = make(depth=1)
    add(scheduler, "a", range(3), stop_token_ids=[1])
    first, second = scheduler.schedule(), scheduler.schedule()
    assert answer(scheduler, first)["a"].finish_reason == "stop"
    assert answer(scheduler, second) == {}


def test_an_aborted_request_is_told_to_the_runner_once_and_only_if_it_knew_it():
    scheduler = make(max_num_seqs=1)
    add(scheduler, "a", range(3))
    add(scheduler, "b", range(3))
    step(scheduler)
    assert scheduler.abort("a")
    assert scheduler.abort("b")
    assert not scheduler.abort("b")
    assert scheduler.has_work
    assert not scheduler.has_unfinished
    output = scheduler.schedule()
    assert (output.finished, output.scheduled) == (("a",), ())
    assert not scheduler.has_work
    assert scheduler.schedule().finished == ()


def test_an_id_may_be_used_again_once_its_request_has_ended():
    scheduler = make(depth=1)
    add(scheduler, "a", range(3))
    first = scheduler.schedule()
    scheduler.abort("a")
    add(scheduler, "a", range(5, 9))
    second = scheduler.schedule()
    assert second.finished == ("a",)
    assert [new.prompt_token_ids for new in second.new_requests] == [(5, 6, 7, 8)]
    assert answer(scheduler, first) == {}
    assert answer(scheduler, second)["a"].new_token_ids == (1,)


def test_an_error_ends_only_its_own_request():
    scheduler = make()
    add(scheduler, "a", range(3))
    add(scheduler, "b", range(3))
    output = scheduler.schedule()
    updates = scheduler.update(output, StepOutput({"b": (1,)}, errors={"a": "NaN logits"}))
    assert [(u.request_id, u.finish_reason, u.error) for u in updates] == [
        ("a", "error", "NaN logits"),
        ("b", None, None),
    ]
    assert step(scheduler)[0] == [("b", 3, 1)]


def test_a_failed_prompt_is_not_offered_as_a_prefix():
    scheduler = make()
    add(scheduler, "a", range(9))
    scheduler.update(scheduler.schedule(), StepOutput({}, errors={"a": "NaN logits"}))
    add(scheduler, "b", range(9))
    assert step(scheduler)[0] == [("b", 0, 9)]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_alone_that_outgrows_the_cache_ends_with_a_message(depth):
    scheduler = make(num_blocks=2, depth=depth)
    add(scheduler, "a", range(7))
    got, error = 0, None
    while scheduler.has_work:
        outputs = [scheduler.schedule() for _ in range(depth + 1)]
        for output in outputs:
            for update in answer(scheduler, output).values():
                got += len(update.new_token_ids)
                error = update.error or error
    assert got == 2  # the slot after the prompt, and the token that this one chose
    assert error == (
        "request 'a' has 9 tokens and the KV cache holds no more: 8 tokens (2 blocks of 4); "
        "raise num_blocks, or lower max_tokens"
    )


def test_prompts_that_cannot_be_right_are_refused():
    scheduler = make(num_blocks=2, max_model_len=20)
    with pytest.raises(UsageError, match="empty prompt"):
        add(scheduler, "a", [])
    with pytest.raises(PromptTooLongError, match=r"20 tokens, .* max_model_len 20"):
        add(scheduler, "a", range(20))
    with pytest.raises(PromptTooLongError, match=r"8 tokens, and the KV cache holds 8 tokens \(2 blocks of 4\)"):
        add(scheduler, "a", range(8))
    add(scheduler, "a", range(7))
    with pytest.raises(UsageError, match="'a' is in use"):
        add(scheduler, "a", range(7))


def test_misuse_of_the_step_protocol_is_an_error():
    scheduler = make(depth=1)
    add(scheduler, "a", range(3))
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(EngineError, match="call update"):
        scheduler.schedule()
    with pytest.raises(EngineError, match="in order"):
        scheduler.update(second, StepOutput({}))
    with pytest.raises(EngineError, match="got 0 tokens"):
        scheduler.update(first, StepOutput({}))


def test_block_tables_are_the_same_object_while_unchanged():
    scheduler = make()
    add(scheduler, "a", range(5))
    tables = []
    for _ in range(4):
        output = scheduler.schedule()
        tables.append(output.scheduled[0].block_tables)
        answer(scheduler, output)
    assert tables[0] is tables[1] is tables[2] is tables[3]
    step(scheduler)
    assert scheduler.schedule().scheduled[0].block_tables == ((1, 2, 3),)


def test_the_scheduler_imports_no_torch():
    code = "import sys, paceline.engine.scheduler, paceline.speculative.ngram; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def score_step(scheduler):
    """A step whose scored positions come back as log probabilities that name them; its updates by id."""
    output = scheduler.schedule()
    scored = {r.request_id: tuple(TokenLogprobs(0, float(p), 1, {}) for p in r.scored) for r in output.scheduled}
    return output, answer(scheduler, output, prompt_logprobs=scored)


def test_a_prompt_is_scored_chunk_by_chunk_and_reported_once():
    scheduler = make(max_chunk=4)
    add(scheduler, "a", range(10), prompt_logprobs=1)
    scored, reported = [], []
    for _ in range(4):
        output, updates = score_step(scheduler)
        scored += [r.scored for r in output.scheduled]
        reported += [update.prompt_logprobs for update in updates.values()]
    assert scored == [range(4), range(4, 8), range(8, 9), range(10, 9)]
    assert [len(entries) if entries else entries for entries in reported] == [9, None]


def test_a_cached_prefix_has_no_logits_and_is_computed_again():
    """Its blocks serve others all the same."""
    scheduler = make()
    add(scheduler, "b", range(9), max_tokens=1, prompt_logprobs=0)
    score_step(scheduler)
    add(scheduler, "d", range(9), max_tokens=1, prompt_logprobs=0)
    add(scheduler, "e", range(9), max_tokens=1)
    output, updates = score_step(scheduler)
    assert shares(output) == [("d", 0, 9), ("e", 8, 1)]
    assert (updates["d"].num_cached_tokens, updates["e"].num_cached_tokens) == (0, 8)


def test_a_preempted_prompt_is_not_scored_twice():
    """b loses its blocks with 8 of 11 positions scored; it takes up what the cache still has, and scores the rest."""
    scheduler = make(num_blocks=5, max_chunk=4)
    add(scheduler, "a", range(100, 107), max_tokens=9)
    score_step(scheduler)
    score_step(scheduler)  # a computed its 7 tokens: 2 blocks
    add(scheduler, "b", range(12), max_tokens=1, prompt_logprobs=0)
    scored, starts, done = [], [], {}
    for _ in range(30):
        output, updates = score_step(scheduler)
        for request in output.scheduled:
            if request.request_id == "b":
                scored += request.scored
                starts.append(request.start)
        done |= {i: u for i, u in updates.items() if u.finish_reason}
        if len(done) == 2:
            break
    assert (starts, scheduler.stats.num_preemptions) == ([0, 4, 4, 8], 1)
    assert scored == list(range(11))
    assert [entry.logprob for entry in done["b"].prompt_logprobs] == list(range(11))


def test_only_the_first_of_n_answers_scores_the_prompt():
    scheduler = make()
    add(scheduler, "a#0", range(9), prompt_logprobs=0, n=2)
    add(scheduler, "a#1", range(9), prompt_logprobs=0, n=2, fork_of="a#0")
    first, _ = score_step(scheduler)
    second, _ = score_step(scheduler)
    assert [(r.request_id, len(r.scored)) for r in first.scheduled] == [("a#0", 8)]
    assert [(r.request_id, len(r.scored)) for r in second.scheduled] == [("a#0", 0), ("a#1", 0)]


def test_a_later_answer_reads_the_cache_though_the_first_may_not():
    scheduler = make(max_num_seqs=1)
    add(scheduler, "a#0", range(9), prompt_logprobs=0, n=2, max_tokens=1)
    add(scheduler, "a#1", range(9), prompt_logprobs=0, n=2, max_tokens=1, fork_of="a#0")
    score_step(scheduler)
    output, updates = score_step(scheduler)
    assert shares(output) == [("a#1", 8, 1)]
    assert updates["a#1"].prompt_logprobs is None


def test_no_answer_comes_before_the_prompts_log_probabilities():
    """The first answer loses its blocks with its prompt half scored and a step in flight; then there is room for the
    second. It waits all the same: its echo begins with what the first has not scored yet."""
    scheduler = make(num_blocks=5, max_chunk=4, depth=2)
    add(scheduler, "other", range(100, 103))
    answer(scheduler, scheduler.schedule())
    add(scheduler, "a#0", range(14), prompt_logprobs=0, n=2)
    add(scheduler, "a#1", range(14), prompt_logprobs=0, n=2, fork_of="a#0")
    outputs = [scheduler.schedule() for _ in range(3)]
    while not scheduler.stats.num_preemptions:
        answer(scheduler, outputs.pop(0), prompt_logprobs={"a#0": (TokenLogprobs(0, 0.0, 1, {}),) * 4})
        outputs.append(scheduler.schedule())
    answer(scheduler, outputs.pop(0), prompt_logprobs={"a#0": (TokenLogprobs(0, 0.0, 1, {}),) * 4})
    scheduler.abort("other")
    assert any(request.request_id == "a#0" for output in outputs for request in output.scheduled)
    assert scheduler.schedule().scheduled == ()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_request_for_no_token_ends_with_its_prompt(depth):
    scheduler = make(max_chunk=4, depth=depth, max_model_len=10)
    add(scheduler, "a", range(10), max_tokens=0, prompt_logprobs=0)
    with pytest.raises(PromptTooLongError):
        add(scheduler, "b", range(11), max_tokens=0, prompt_logprobs=0)
    outputs = []
    updates = {}
    while scheduler.has_unfinished:
        output = scheduler.schedule()
        outputs.append(output)
        assert not any(request.samples for request in output.scheduled)
        if len(outputs) > depth or not output.scheduled:
            oldest = outputs.pop(0)
            scores = {r.request_id: tuple(TokenLogprobs(0, 0.0, 1, {}) for _ in r.scored) for r in oldest.scheduled}
            updates |= answer(scheduler, oldest, prompt_logprobs=scores)
    assert (updates["a"].new_token_ids, updates["a"].finish_reason) == ((), "length")
    assert len(updates["a"].prompt_logprobs) == 9


def test_a_request_that_generates_nothing_takes_no_drafts():
    """Its prompt's log probabilities are reported with the last but one token, and may be answered with drafts."""
    scheduler = make(max_chunk=2)
    add(scheduler, "a", range(3), max_tokens=0, prompt_logprobs=0)
    output = scheduler.schedule()
    answer(scheduler, output, prompt_logprobs={"a": (TokenLogprobs(1, -1.0, 1, {}), TokenLogprobs(2, -1.0, 1, {}))})
    scheduler.set_drafts("a", [5, 6])
    shared, updates = step(scheduler)
    assert shared == [("a", 2, 1)]
    assert updates["a"].finish_reason == "length"
