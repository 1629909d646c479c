"""Beam search gives the answers and scores of transformers' own, in float32, whatever the machinery between does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from paceline.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from paceline.engine.engine import Engine, EngineRequest, answer_ids
from paceline.engine.model_runner import ModelRunner
from paceline.engine.step import RequestUpdate
from paceline.sampling.params import SamplingParams

SCORE_BOUND = 2e-5  # of a score, in float32
PROMPT = (5, 17, 60, 4, 4, 81, 33, 2, 90)


def beams(width: int, n: int | None = None, **options: Any) -> SamplingParams:
    options = {"max_tokens": 12, **options}
    return SamplingParams(n=n or width, best_of=width, use_beam_search=True, **options)


def run(
    decoder: Any,
    requests: Sequence[tuple[Sequence[int], SamplingParams]],
    *,
    eos: Sequence[int] = (),
    blocks: int = 400,
    **options: Any,
) -> tuple[list[list[RequestUpdate]], Engine]:
    """Each request's last update of every answer; invariants are checked after every step."""
    config = EngineConfig(
        max_model_len=256,
        cache=CacheConfig(4, blocks, options.pop("prefix_cache", True)),
        scheduler=SchedulerConfig(max_num_seqs=24, max_num_batched_tokens=64, max_chunk=options.pop("chunk", None)),
        **options,
    )
    groups = decoder.kv_groups
    counts = (blocks,) * len(groups)
    engine = Engine(config, groups, counts, ModelRunner(decoder, counts, 4))
    for index, (prompt, params) in enumerate(requests):
        engine.add_request(EngineRequest(str(index), prompt, params, eos_token_ids=frozenset(eos)))
    tokens: dict[str, tuple[int, ...]] = {}
    last: dict[str, RequestUpdate] = {}
    while engine.has_work:
        for update in engine.step():
            assert update.error is None, update.error
            tokens[update.request_id] = tokens.get(update.request_id, ()) + update.new_token_ids
            last[update.request_id] = update._replace(new_token_ids=tokens[update.request_id])
        engine.scheduler.check_invariants()
    assert set(engine.scheduler.stats.cache.used_blocks) == {0}
    found = [[last[i] for i in answer_ids(str(index), params)] for index, (_, params) in enumerate(requests)]
    return found, engine


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Any]) -> Callable[[str], tuple[Any, Any]]:
    """name -> (our decoder, transformers' model)."""

    @cache
    def make(name: str) -> tuple[Any, Any]:
        tiny = tiny_model(name)
        return tiny.decoder(), tiny.hf

    return make


@cache
def expected(
    hf: Any, prompt: tuple[int, ...], params: SamplingParams, eos: tuple[int, ...]
) -> tuple[list[tuple[int, ...]], list[float]]:
    """transformers' answers, end token included and padding cut, and their scores."""
    with torch.inference_mode():
        found = hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            num_beams=params.width,
            num_return_sequences=params.n,
            max_new_tokens=params.max_tokens,
            min_new_tokens=params.min_tokens or None,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            repetition_penalty=params.repetition_penalty,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    answers = []
    for row in found.sequences[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        answers.append(tuple(row[:end]))
    return answers, found.sequences_scores.tolist()


def check(found: Sequence[RequestUpdate], hf: Any, prompt: Sequence[int], params: SamplingParams, eos: Sequence[int]):
    answers, scores = expected(hf, tuple(prompt), params, tuple(eos))
    assert [update.new_token_ids for update in found] == answers
    assert [update.score for update in found] == pytest.approx(scores, rel=SCORE_BOUND, abs=SCORE_BOUND)


FEW, MANY = (7,), tuple(range(3, 90, 6))  # end tokens: one that is rare, and fifteen, so that beams end all the time


@pytest.mark.parametrize("eos", [FEW, MANY], ids=["rare-end", "frequent-end"])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_answers_and_scores_are_transformers(model, length_penalty, early_stopping, eos):
    decoder, hf = model("llama")
    params = beams(4, length_penalty=length_penalty, early_stopping=early_stopping)
    ((found,), _) = run(decoder, [(PROMPT, params)], eos=eos)
    check(found, hf, PROMPT, params, eos)


@pytest.mark.parametrize("name", ["qwen2-window", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize(("width", "n"), [(2, 1), (3, 3), (5, 2), (8, 8)])
def test_every_width_and_family(model, name, width, n):
    """Two KV groups where the model has windows: the beams' tables fork in both."""
    decoder, hf = model(name)
    params = beams(width, n)
    ((found,), _) = run(decoder, [(PROMPT, params)], eos=MANY[::4])
    check(found, hf, PROMPT, params, MANY[::4])


@pytest.mark.parametrize("given", [{"repetition_penalty": 1.4}, {"min_tokens": 5}, {"repetition_penalty": 0.8}])
def test_penalties_and_min_tokens_are_transformers(model, given):
    decoder, hf = model("llama")
    params = beams(4, **given)
    ((found,), _) = run(decoder, [(PROMPT, params)], eos=MANY)
    check(found, hf, PROMPT, params, MANY)


def batch(vocab: int = 96) -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Beams of several widths among ordinary requests; some prompts begin alike."""
    generator = torch.Generator().manual_seed(11)
    head = torch.randint(1, vocab, (13,), generator=generator).tolist()
    prompts = [
        tuple(head[:size] + torch.randint(1, vocab, (4,), generator=generator).tolist()) for size in range(1, 14)
    ]
    plain = SamplingParams(temperature=0, max_tokens=14)
    many = SamplingParams(temperature=0.9, seed=3, n=2, max_tokens=9)
    kinds = [beams(4), plain, beams(8, 2, length_penalty=0.0), many, beams(2), plain, beams(3, 1, max_tokens=5)]
    return list(zip(prompts[::2], kinds, strict=True))


MACHINERY = [
    {},
    {"chunk": 3, "prefix_cache": False},
    {"chunk": 1, "async_depth": 2},
    {"blocks": 36},
    {"blocks": 36, "async_depth": 1, "chunk": 5},
    {"speculative": SpeculativeConfig()},
]


@pytest.mark.parametrize("machinery", MACHINERY, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_beams_among_other_requests_get_what_they_get_alone(model, name, machinery):
    """Chunked, preempted, ahead of the results, with drafts beside them: the answers are transformers'."""
    decoder, hf = model(name)
    requests = batch()
    found, engine = run(decoder, requests, eos=FEW, **machinery)
    for (prompt, params), updates in zip(requests, found, strict=True):
        if params.use_beam_search:
            check(updates, hf, prompt, params, FEW)
        else:
            ((alone,), _) = run(decoder, [(prompt, params)], eos=FEW)
            assert [update.new_token_ids for update in updates] == [update.new_token_ids for update in alone]
    preempted = engine.scheduler.stats.num_preemptions
    assert preempted > 2 if "blocks" in machinery else preempted == 0


def test_nan_fails_the_beams_and_nobody_else(model):
    decoder, _ = model("llama")
    config = EngineConfig(max_model_len=256, cache=CacheConfig(4, 64, False))
    runner = ModelRunner(decoder, (64,), 4)
    engine = Engine(config, decoder.kv_groups, (64,), runner)
    plain = SamplingParams(temperature=0, max_tokens=8)
    engine.add_request(EngineRequest("beams", PROMPT, beams(3, 2)))
    engine.add_request(EngineRequest("plain", PROMPT, plain))
    for _ in range(3):
        engine.step()
    block = engine.scheduler.cache.block_tables("beams#beam1")[0][2]  # the second beam's own, from here on
    runner.kv[0].k_HSD[:, block * 4 : block * 4 + 4] = float("nan")
    runner.kv[0].v_HSD[:, block * 4 : block * 4 + 4] = float("nan")
    last = {}
    while engine.has_work:
        last |= {update.request_id: update for update in engine.step()}
    assert {name for name, update in last.items() if update.error} == {"beams#0", "beams#1"}
    assert "not finite" in (last["beams#0"].error or "")
    assert last["plain"].finish_reason == "length"
    assert set(engine.scheduler.stats.cache.used_blocks) == {0}
