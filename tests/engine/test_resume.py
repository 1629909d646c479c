"""An engine goes on with what another had begun: the same tokens, told once, whatever reads the history."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.engine.engine import Engine, EngineRequest, answer_ids
from paceline.engine.step import RequestUpdate
from paceline.llm import LLM
from paceline.sampling.params import SamplingParams

PROMPT = (3, 7, 9, 4, 20)
BASE = SamplingParams(temperature=1.0, seed=11, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", params=[None, {"num_speculative_tokens": 3, "prompt_lookup_min": 1}])
def engine(request: pytest.FixtureRequest, tiny_directory: Path) -> Iterator[Engine]:
    with LLM(str(tiny_directory), device="cpu", block_size=4, speculative_config=request.param) as llm:
        yield llm.model.engine


def finish(engine: Engine, request: EngineRequest) -> dict[str, list[RequestUpdate]]:
    """The updates of each answer."""
    engine.add_request(request)
    updates: dict[str, list[RequestUpdate]] = {name: [] for name in answer_ids(request.request_id, request.params)}
    while engine.has_work:
        for update in engine.step():
            updates[update.request_id].append(update)
    engine.scheduler.check_invariants()
    assert engine.scheduler.stats.cache.used_blocks == (0,)
    return updates


def tokens_of(updates: list[RequestUpdate]) -> list[int]:
    return [token for update in updates for token in update.new_token_ids]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"repetition_penalty": 1.7},
        {"min_tokens": 15, "stop_token_ids": tuple(range(3, 20))},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"n": 1, "best_of": 1},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
@pytest.mark.parametrize("num_sent", [1, 3, 12])
def test_the_rest_is_what_it_would_have_been(engine, changes, num_sent):
    params = replace(BASE, **changes)
    whole = finish(engine, EngineRequest("a", PROMPT, params, frozenset({2})))["a"]
    tokens = tokens_of(whole)
    engine.scheduler.reset_prefix_cache()
    rest = finish(
        engine, EngineRequest("a", PROMPT, params, frozenset({2}), sent_token_ids=[tuple(tokens[:num_sent])])
    )["a"]
    assert tokens_of(rest) == tokens[num_sent:]
    assert (rest[-1].finish_reason, rest[-1].stop_reason) == (whole[-1].finish_reason, whole[-1].stop_reason)
    assert all(update.prompt_logprobs is None for update in rest)  # told before the first token
    if params.logprobs is not None:
        chosen = [entry.token_id for update in rest for entry in update.logprobs]
        assert chosen == tokens[num_sent:]


def test_of_several_answers_only_those_that_have_not_ended_go_on(engine):
    params = replace(BASE, n=3, presence_penalty=1.0)
    whole = finish(engine, EngineRequest("a", PROMPT, params))
    tokens = [tokens_of(whole[name]) for name in answer_ids("a", params)]
    sent = [None, tuple(tokens[1][:5]), ()]
    rest = finish(engine, EngineRequest("a", PROMPT, params, sent_token_ids=sent))
    assert [tokens_of(rest[name]) for name in answer_ids("a", params)] == [[], tokens[1][5:], tokens[2]]


def test_beams_begin_anew(engine):
    params = SamplingParams(n=2, use_beam_search=True, max_tokens=6)
    whole = finish(engine, EngineRequest("a", PROMPT, params))
    again = finish(engine, EngineRequest("a", PROMPT, params, sent_token_ids=[(), ()]))
    assert {name: tokens_of(one) for name, one in again.items()} == {n: tokens_of(one) for n, one in whole.items()}


def test_the_seed_that_was_drawn_is_told(engine):
    """A request without a seed can be resumed too: its engine says which it drew."""
    request = EngineRequest("a", PROMPT, replace(BASE, seed=None))
    seed = engine.add_request(request)
    drawn: list[int] = []
    while engine.has_work:
        drawn += [token for update in engine.step() for token in update.new_token_ids]
    resumed = replace(request, params=replace(BASE, seed=seed), sent_token_ids=[tuple(drawn[:4])])
    assert tokens_of(finish(engine, resumed)["a"]) == drawn[4:]
