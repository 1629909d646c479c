"""Promise: with `deterministic`, not a bit of a request's log probabilities depends on what else runs, or on how it is
cut into steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from paceline.config import CacheConfig, EngineConfig, SchedulerConfig
from paceline.engine.engine import Engine, EngineRequest
from paceline.engine.model_runner import ModelRunner
from paceline.errors import UsageError
from paceline.models.deterministic import make_deterministic, vocabulary_refusal
from paceline.sampling.params import SamplingParams

VOCAB, MAX_TOKENS = 96, 6
PARAMS = SamplingParams(temperature=0.8, seed=1, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=-1, prompt_logprobs=2)
UNSCORED = replace(PARAMS, prompt_logprobs=None)  # a scored prompt is computed whole, whatever is cached


def run(
    decoder: Any, prompts, *, chunk=None, blocks=600, prefix_cache=False, warm=(), params=PARAMS, deterministic=True
):
    """Every number of each prompt's answer, with the engine. `warm`: prompts that run to their end before."""
    config = EngineConfig(
        max_model_len=128,
        cache=CacheConfig(4, blocks, prefix_cache),
        scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=256, max_chunk=chunk),
    )
    counts = (blocks,) * len(decoder.kv_groups)
    engine = Engine(config, decoder.kv_groups, counts, ModelRunner(decoder, counts, 4, deterministic=deterministic))
    found: dict[str, tuple[list[Any], list[Any]]] = {}
    for name, some in (("warm", warm), ("", prompts)):
        for index, prompt in enumerate(some):
            engine.add_request(EngineRequest(f"{name}{index}", prompt, params))
        while engine.has_work:
            for update in engine.step():
                assert update.error is None
                tokens, scored = found.setdefault(update.request_id, ([], []))
                tokens.extend(zip(update.new_token_ids, update.logprobs, strict=True))
                scored.extend(update.prompt_logprobs or ())
    return [found[str(index)] for index in range(len(prompts))], engine


@cache
def make_prompts():
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 40, (64,), generator=generator).tolist()
    prompts = [tuple(torch.randint(1, VOCAB, (n,), generator=generator).tolist()) for n in lengths]
    return [prompts[0][:1], (*prompts[1], *prompts[2], *prompts[3])[:37], *prompts[2:]]


@pytest.fixture(scope="module")
def deterministic(tiny_model):
    @cache
    def make(name: str, **options: Any) -> tuple[Any, list[Any]]:
        """A decoder, and what it answers to two of the prompts, each alone."""
        decoder = tiny_model(name).decoder(**options)
        make_deterministic(decoder)
        return decoder, [run(decoder, [prompt])[0][0] for prompt in make_prompts()[:2]]

    return make


NAMES = ["llama-llama3", "llama-mqa", "gemma2", "gpt2", "bloom-six-heads"]


@pytest.mark.parametrize("name", NAMES)
def test_no_bit_depends_on_what_else_runs(deterministic, name):
    decoder, alone = deterministic(name)
    found, _ = run(decoder, make_prompts())
    assert found[:2] == alone


@pytest.mark.parametrize(("name", "chunk"), [*((name, 7) for name in NAMES), ("gemma2", 1)])
def test_nor_on_chunks(deterministic, name, chunk):
    decoder, alone = deterministic(name)
    found, _ = run(decoder, make_prompts()[:5], chunk=chunk)
    assert found[:2] == alone


@pytest.mark.parametrize("name", ["llama-llama3", "gemma2"])
def test_nor_on_a_prefix_hit(deterministic, name):
    """The same prompt has run before; and another one of which this one is the first half."""
    decoder, _ = deterministic(name)
    prompt = make_prompts()[1]
    (cold,), _ = run(decoder, [prompt], params=UNSCORED)
    for warm in ([prompt], [(*prompt[:20], 5, 6, 7)]):
        (found,), engine = run(decoder, [prompt], prefix_cache=True, warm=warm, params=UNSCORED)
        assert engine.scheduler.stats.cache.prefix_hit_tokens > 0
        assert found == cold


@pytest.mark.parametrize("name", ["llama-llama3", "gemma2"])
def test_nor_on_preemption(deterministic, name):
    """14 blocks of 4 tokens: recomputed requests compute as prompts what they decoded before."""
    decoder, alone = deterministic(name)
    found, engine = run(decoder, make_prompts()[:6], blocks=14, chunk=16)
    assert engine.scheduler.stats.num_preemptions > 0
    assert found[:2] == alone


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"quantize": "int8"}], ids=["bfloat16", "int8"])
def test_in_other_dtypes_and_formats(deterministic, options):
    decoder, alone = deterministic("llama-llama3", **options)
    for prompts, chunk in ((make_prompts(), None), (make_prompts()[:3], 7)):
        assert run(decoder, prompts, chunk=chunk)[0][:2] == alone


def test_without_it_bits_differ(tiny_model):
    """Or the tests above would compare nothing."""
    decoder = tiny_model("llama-llama3").decoder()
    alone = run(decoder, make_prompts()[1:2], deterministic=False)[0]
    assert run(decoder, make_prompts(), deterministic=False)[0][1:2] != alone


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_refused(tiny_model, name):
    with pytest.raises(UsageError, match="deterministic: the router of a mixture of experts"):
        make_deterministic(tiny_model(name).decoder())


def test_a_vocabulary_that_cuda_sums_by_its_alignment_is_refused():
    assert vocabulary_refusal(50257, torch.device("cpu")) is None
    assert vocabulary_refusal(50256, torch.device("cuda")) is None
    refusal = "a vocabulary of 50257 is no multiple of 8, and CUDA's softmax sums rows by how they are aligned"
    assert vocabulary_refusal(50257, torch.device("cuda")) == refusal


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-llama3", "llama-gelu", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_on_a_gpu(deterministic, name, dtype, quantize):
    decoder, alone = deterministic(name, dtype=dtype, quantize=quantize, device="cuda")
    for count, options in ((64, {}), (5, {"chunk": 7}), (5, {"chunk": 1}), (6, {"blocks": 14, "chunk": 16})):
        assert run(decoder, make_prompts()[:count], **options)[0][:2] == alone
    prompt = make_prompts()[1]
    (cold,), _ = run(decoder, [prompt], params=UNSCORED)
    assert run(decoder, [prompt], prefix_cache=True, warm=[prompt], params=UNSCORED)[0] == [cold]
