"""Promise 1: the engine gives the reference's tokens and log probabilities, whatever the machinery between does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from paceline import reference
from paceline.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from paceline.engine import model_runner
from paceline.engine.engine import Engine, EngineRequest
from paceline.engine.model_runner import ModelRunner
from paceline.kernels.attention_plan import build_attention
from paceline.sampling.logprobs import TokenLogprobs
from paceline.sampling.params import SamplingParams

MAX_TOKENS = 10
ERROR_BOUND = 1e-4  # of a log probability, in float32; a smaller gap between the two likeliest tokens is a tie
ROOMY, TIGHT = 200, 14  # blocks of 4 tokens; TIGHT holds a third of the requests, and the longest alone

GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=-1)


@dataclass(frozen=True)
class Generated:
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


def run_engine(
    decoder: Any,
    requests: Sequence[tuple[Sequence[int], SamplingParams]],
    *,
    blocks: int = ROOMY,
    planned: bool = True,
    **options: Any,
) -> tuple[list[Generated], Engine]:
    """All requests in one engine, invariants checked after every step."""
    config = EngineConfig(
        max_model_len=256,
        cache=CacheConfig(4, blocks, options.pop("prefix_cache", True)),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64, max_chunk=options.pop("chunk", None)),
        **options,
    )
    groups = decoder.kv_groups
    counts = (blocks,) * len(groups)
    runner = ModelRunner(decoder, counts, 4)
    if not planned:
        runner.decode_refusal = None  # as where kernels read lengths and block tables; their plain twins do it here
    engine = Engine(config, groups, counts, runner)
    for index, (prompt, params) in enumerate(requests):
        engine.add_request(EngineRequest(str(index), prompt, params))
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[TokenLogprobs]] = {}
    while engine.has_work:
        for update in engine.step():
            assert update.error is None, update.error
            tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
            logprobs.setdefault(update.request_id, []).extend(update.logprobs)
        engine.scheduler.check_invariants()
    ids = [
        f"{index}" if params.n == 1 else f"{index}#{child}"
        for index, (_, params) in enumerate(requests)
        for child in range(params.n)
    ]
    return [Generated(tuple(tokens[i]), tuple(logprobs.get(i, ()))) for i in ids], engine


@cache
def make_prompts(vocab: int, seed: int = 3) -> tuple[tuple[int, ...], ...]:
    """Uneven lengths, some past a window; some begin alike, and some repeat themselves, for the proposer."""
    generator = torch.Generator().manual_seed(seed)

    def random(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, vocab, (length,), generator=generator).tolist())

    head, loop = random(17), random(3)
    return (random(1), random(4), head, head + random(5), head + random(2), loop * 7, (5, 5, 5, 5, 5, 5), random(31))


class Oracle:
    """The reference's greedy continuations and their log probabilities, computed once a model."""

    def __init__(self, model: reference.Reference) -> None:
        self.model = model

    @cache  # noqa: B019  # the object lives as long as the tests that ask it
    def continuation(self, prompt: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
        tokens = reference.generate(self.model, list(prompt), MAX_TOKENS)
        return tokens, self.logprobs(prompt, tokens)

    def logprobs(self, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """[len(tokens), V]: before each of `tokens`, which are forced."""
        logits = reference.forward(self.model, [*prompt, *tokens[:-1]], reference.Cache())
        return logits[len(prompt) - 1 :].log_softmax(dim=-1)

    def check(self, prompt: tuple[int, ...], found: Generated, again: Callable[[tuple[int, ...]], Generated]) -> None:
        """`found` is the reference's continuation, up to a tie; after one the reference's token is forced.

        `again(prompt)` asks the same engine for the continuation of a longer prompt.
        """
        tokens, logprobs = self.continuation(prompt)
        done = 0  # tokens compared
        while done < MAX_TOKENS:
            for i, token in enumerate(found.token_ids[: MAX_TOKENS - done], start=done):
                row = torch.tensor([value for _, value in sorted(found.logprobs[i - done].top.items())])
                torch.testing.assert_close(row, logprobs[i], rtol=ERROR_BOUND, atol=ERROR_BOUND)
                if token != tokens[i]:
                    first, second = logprobs[i].topk(2).values
                    assert first - second < 2 * ERROR_BOUND, f"token {i} of {prompt}: {token}, not {tokens[i]}"
                    done = i + 1
                    found = again((*prompt, *tokens[:done]))
                    break
            else:
                return


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[[str], Any]) -> Callable[[str], tuple[Any, Oracle]]:
    @cache
    def make(name: str) -> tuple[Any, Oracle]:
        model = tiny_model(name)
        return model.decoder(), Oracle(reference.load(model.checkpoint, model.config))

    return make


NAMES = ["llama-llama3", "llama-mqa", "qwen2-window", "qwen3", "gemma2", "gemma3", "gpt2", "bloom-six-heads"]
# Half of all there are: each model meets any two of the switches together with every chunk, and half of the models meet
# each four.
MACHINERY = [
    (name, prefix_cache, chunk, tight, drafts)
    for number, name in enumerate(NAMES)
    for prefix_cache, chunk, tight, drafts in itertools.product([1, 0], [1, 7, None], [0, 1], [0, 1])
    if (number + prefix_cache + tight + drafts) % 2 == 0
]


@pytest.mark.parametrize(
    ("name", "prefix_cache", "chunk", "tight", "drafts"),
    MACHINERY,
    ids=[
        f"prefix{p}-chunk{c}-{'tight' if t else 'roomy'}-{'ngram' if d else 'plain'}-{name}"
        for name, p, c, t, d in MACHINERY
    ],
)
def test_tokens_and_logprobs_are_the_references(oracle, name, prefix_cache, chunk, tight, drafts):
    decoder, expected = oracle(name)
    prompts, blocks = make_prompts(96), TIGHT if tight else ROOMY
    speculative = SpeculativeConfig() if drafts else None
    machinery = {"prefix_cache": bool(prefix_cache), "chunk": chunk, "blocks": blocks, "speculative": speculative}
    found, engine = run_engine(decoder, [(prompt, GREEDY) for prompt in prompts], **machinery)
    for prompt, generated in zip(prompts, found, strict=True):
        expected.check(prompt, generated, lambda p: run_engine(decoder, [(p, GREEDY)], **machinery)[0][0])
    preempted = engine.scheduler.stats.num_preemptions
    assert preempted > 0 if blocks == TIGHT else preempted == 0


@pytest.mark.parametrize("speculative", [None, SpeculativeConfig()], ids=["plain", "ngram"])
@pytest.mark.parametrize("name", ["qwen2-window", "gemma2", "bloom-six-heads"])
def test_steps_whose_attention_is_not_planned_on_the_host(oracle, name, speculative, monkeypatch):
    """Prompts, chunks, drafts and decodes in one step; those with one token come first, where they have a kernel."""
    decoder, expected = oracle(name)
    machinery = {"planned": False, "chunk": 7, "blocks": TIGHT, "speculative": speculative}
    prompts, steps = make_prompts(96), []

    def build(*args, **options):
        steps.append(build_attention(*args, **options))
        return steps[-1]

    monkeypatch.setattr(model_runner, "build_attention", build)
    found, _ = run_engine(decoder, [(prompt, GREEDY) for prompt in prompts], **machinery)
    for prompt, generated in zip(prompts, found, strict=True):
        expected.check(prompt, generated, lambda p: run_engine(decoder, [(p, GREEDY)], **machinery)[0][0])
    ragged = [step for step in steps if step.ragged is not None]
    assert not any(group.segments for step in steps for group in step.groups)
    assert max(step.ragged.decodes for step in ragged) > 1
    for step in ragged:
        assert step.ragged.decodes == sum(end - start == 1 for start, end in itertools.pairwise(step.query_starts))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("blocks", [ROOMY, TIGHT])
@pytest.mark.parametrize("speculative", [None, SpeculativeConfig()], ids=["plain", "ngram"])
def test_running_ahead_changes_nothing(oracle, depth, blocks, speculative):
    """schedule() one and two steps ahead of update(), with placeholders for the tokens not yet known."""
    decoder, expected = oracle("gemma2")
    machinery = {"blocks": blocks, "speculative": speculative, "chunk": 7, "async_depth": depth}
    prompts = make_prompts(96)
    found, _ = run_engine(decoder, [(prompt, GREEDY) for prompt in prompts], **machinery)
    for prompt, generated in zip(prompts, found, strict=True):
        expected.check(prompt, generated, lambda p: run_engine(decoder, [(p, GREEDY)], **machinery)[0][0])


def sampled(seed: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=MAX_TOKENS, **options)


@pytest.mark.parametrize("blocks", [ROOMY, TIGHT])
@pytest.mark.parametrize("speculative", [None, SpeculativeConfig()], ids=["plain", "ngram"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(oracle, name, blocks, speculative):
    """Sampled, with penalties: neither neighbours nor preemption nor drafts move a request's random numbers."""
    decoder, _ = oracle(name)
    requests = [
        (prompt, sampled(index, repetition_penalty=1.1, presence_penalty=0.2))
        for index, prompt in enumerate(make_prompts(96))
    ]
    together, _ = run_engine(decoder, requests, blocks=blocks, speculative=speculative)
    for request, generated in zip(requests, together, strict=True):
        alone, _ = run_engine(decoder, [request], prefix_cache=False)
        assert generated.token_ids == alone[0].token_ids


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_n_answers_share_a_prompt_and_nothing_else(oracle, name, length, prefix_cache):
    """Copy-on-write: each of n answers equals the request that its own seed would make alone."""
    decoder, _ = oracle(name)
    prompt = make_prompts(96)[-1][:length]
    (first, second, third), _ = run_engine(decoder, [(prompt, sampled(5, n=3))], prefix_cache=prefix_cache)
    seeds = [engine_seed(5, index) for index in range(3)]
    for seed, answer in zip(seeds, (first, second, third), strict=True):
        alone, _ = run_engine(decoder, [(prompt, sampled(seed))], prefix_cache=False)
        assert answer.token_ids == alone[0].token_ids
    assert len({first.token_ids, second.token_ids, third.token_ids}) > 1


def engine_seed(seed: int, index: int) -> int:
    from paceline.sampling.random import bits64

    return seed if index == 0 else bits64(seed, index, stream=2)


def test_answers_share_the_prompts_blocks(oracle):
    """Four answers to 31 tokens in 4-token blocks: 8 blocks for the first, one of their own for each other."""
    decoder, _ = oracle("llama")
    config = EngineConfig(max_model_len=256, cache=CacheConfig(4, 64, False))
    engine = Engine(config, decoder.kv_groups, (64,), ModelRunner(decoder, (64,), 4))
    engine.add_request(EngineRequest("r", make_prompts(96)[-1], sampled(1, n=4)))
    for _ in range(3):
        engine.step()
    assert engine.scheduler.num_running == 4
    assert engine.scheduler.stats.cache.used_blocks[0] <= 8 + 2 * 3 + 1


def test_a_prefix_is_found_again(oracle):
    decoder, _ = oracle("llama")
    prompt = make_prompts(96)[-1]
    config = EngineConfig(max_model_len=256, cache=CacheConfig(4, 64))
    engine = Engine(config, decoder.kv_groups, (64,), ModelRunner(decoder, (64,), 4))
    cached = []
    for name in ("a", "b"):
        engine.add_request(EngineRequest(name, prompt, GREEDY))
        while engine.has_work:
            cached += [update.num_cached_tokens for update in engine.step() if update.finish_reason]
    assert cached == [0, 28]  # 31 tokens: 7 whole blocks, and the last token is always computed


def test_nan_fails_its_own_request(oracle):
    """A request whose keys turn to NaN ends with an error; the others, in its blocks' neighbourhood, go on unharmed."""
    decoder, expected = oracle("llama")
    prompts = make_prompts(96)
    config = EngineConfig(max_model_len=256, cache=CacheConfig(4, 64, False))
    runner = ModelRunner(decoder, (64,), 4)
    engine = Engine(config, decoder.kv_groups, (64,), runner)
    for index, prompt in enumerate(prompts):
        engine.add_request(EngineRequest(str(index), prompt, GREEDY))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for update in engine.step():
        tokens[update.request_id] += update.new_token_ids
    victim = engine.scheduler.cache.block_tables("2")[0][0]
    runner.kv[0].k_HSD[:, victim * 4 : victim * 4 + 4] = float("nan")
    runner.kv[0].v_HSD[:, victim * 4 : victim * 4 + 4] = float("nan")
    errors = {}
    while engine.has_work:
        for update in engine.step():
            tokens[update.request_id] += update.new_token_ids
            if update.error:
                errors[update.request_id] = update.error
    engine.add_request(EngineRequest("later", prompts[-1], GREEDY))  # reuses the failed request's blocks
    tokens["later"] = []
    while engine.has_work:
        for update in engine.step():
            tokens["later"] += update.new_token_ids
    assert list(errors) == ["2"]
    assert "not finite" in errors["2"]
    for index, prompt in enumerate(prompts):
        if index != 2:
            assert tokens[str(index)] == expected.continuation(prompt)[0]
    assert tokens["later"] == expected.continuation(prompts[-1])[0]
