"""The same promises on a CUDA device: the reference's tokens in float32, low precision no worse than plain torch's."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from paceline import reference
from paceline.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from paceline.engine.engine import Engine, EngineRequest
from paceline.engine.model_runner import ModelRunner
from paceline.llm import LLM
from paceline.models.load import load_decoder
from paceline.sampling.params import SamplingParams

pytestmark = pytest.mark.gpu

MAX_TOKENS = 10
FAMILIES = ["llama-llama3", "llama-mqa", "llama-bias", "qwen2-window", "qwen3", "gemma2", "gemma3"]


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    head = torch.randint(1, 96, (17,), generator=generator).tolist()
    tails = [torch.randint(1, 96, (n,), generator=generator).tolist() for n in (1, 5, 2, 31)]
    return [tails[0], head, head + tails[1], head + tails[2], [7, 8, 9] * 7, tails[3]]


def run(decoder: Any, prompts: list[list[int]], params: SamplingParams, **options: Any) -> tuple[list[Any], Engine]:
    blocks = options.pop("blocks")
    config = EngineConfig(
        max_model_len=256,
        cache=CacheConfig(4, blocks),
        scheduler=SchedulerConfig(16, 64, options.pop("chunk")),
        **options,
    )
    counts = (blocks,) * len(decoder.kv_groups)
    engine = Engine(config, decoder.kv_groups, counts, ModelRunner(decoder, counts, 4))
    for index, prompt in enumerate(prompts):
        engine.add_request(EngineRequest(str(index), prompt, params))
    found: list[Any] = [[] for _ in prompts]
    while engine.has_work:
        for update in engine.step():
            assert update.error is None
            found[int(update.request_id)] += zip(update.new_token_ids, update.logprobs, strict=True)
        engine.scheduler.check_invariants()
    return found, engine


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("blocks", [200, 14], ids=["roomy", "tight"])
@pytest.mark.parametrize("speculative", [None, SpeculativeConfig()], ids=["plain", "ngram"])
def test_float32_on_the_device_is_the_reference(
    tiny_model: Callable[[str], Any], name: str, chunk: int | None, blocks: int, speculative: SpeculativeConfig | None
):
    model = tiny_model(name)
    decoder = load_decoder(model.checkpoint, model.config, dtype=torch.float32, device="cuda")
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=-1)
    prompts = random_prompts()
    found, engine = run(decoder, prompts, params, chunk=chunk, blocks=blocks, speculative=speculative)
    assert (engine.scheduler.stats.num_preemptions > 0) == (blocks == 14)
    oracle = reference.load(model.checkpoint, model.config)
    for prompt, generated in zip(prompts, found, strict=True):
        tokens = [token for token, _ in generated]
        logits = reference.forward(oracle, [*prompt, *tokens[:-1]], reference.Cache())[len(prompt) - 1 :]
        expected = logits.log_softmax(dim=-1)
        for i, (token, entry) in enumerate(generated):
            row = torch.tensor([value for _, value in sorted(entry.top.items())])
            torch.testing.assert_close(row, expected[i], rtol=1e-4, atol=1e-4)
            assert expected[i].max() - expected[i][token] < 2e-4  # the likeliest token, or tied with it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_low_precision_is_no_worse_than_transformers(
    tiny_model: Callable[[str], Any], pages: Any, name: str, dtype: torch.dtype, prompts: list[list[int]]
):
    """Error against float32: at most twice that of transformers' own modules in the same dtype."""
    model = tiny_model(name)
    decoder = load_decoder(model.checkpoint, model.config, dtype=dtype, device="cuda")
    plain = type(model.hf)(model.hf.config).to("cuda", dtype).eval()
    plain.load_state_dict(model.hf.state_dict())
    sequence = prompts[-1]
    exact = model.hf_logits(sequence)
    with torch.inference_mode():
        theirs = plain(torch.tensor([sequence], device="cuda"), use_cache=False).logits[0].float().cpu()
    ours = pages(decoder, [sequence]).run()[0].float().cpu()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_variant_on_the_device_is_transformers(
    each_model: Any, pages: Any, dtype: torch.dtype, prompts: list[list[int]]
):
    """Logits in chunks of 7, in float32 transformers' own, in bfloat16 within twice what its modules lose."""
    decoder = load_decoder(each_model.checkpoint, each_model.config, dtype=dtype, device="cuda")
    found = [logits.float().cpu() for logits in pages(decoder, prompts).run(7)]
    exact = [each_model.hf_logits(prompt) for prompt in prompts]
    if dtype == torch.float32:
        for logits, expected in zip(found, exact, strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        return
    plain = copy.deepcopy(each_model.hf).to("cuda", dtype)
    with torch.inference_mode():
        theirs = [plain(torch.tensor([p], device="cuda"), use_cache=False).logits[0].float().cpu() for p in prompts]
    error, allowed = (sum((a - b).norm() for a, b in zip(x, exact, strict=True)) for x in (found, theirs))
    assert error <= 2 * allowed


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "bloom"])
def test_beams_and_prompt_scores_on_the_device_are_those_of_the_cpu(tiny_model: Callable[[str], Any], name: str):
    model = tiny_model(name)
    beams = SamplingParams(n=2, best_of=4, use_beam_search=True, max_tokens=10, temperature=0)
    scored = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)

    def answers(device: str) -> list[Any]:
        options = {"device": device, "dtype": "float32", "skip_tokenizer_init": True, "num_blocks": 64, "block_size": 4}
        with LLM(str(model.directory), **options) as llm:
            prompts = [{"prompt_token_ids": prompt} for prompt in random_prompts()[:3]]
            return llm.generate(prompts, beams) + llm.generate(prompts, scored)

    for ours, theirs in zip(answers("cuda"), answers("cpu"), strict=True):
        assert [one.token_ids for one in ours.outputs] == [one.token_ids for one in theirs.outputs]
        for one, two in zip(ours.prompt_logprobs or (), theirs.prompt_logprobs or (), strict=True):
            assert (one is None) == (two is None)
            for token in (one or {}).keys() & (two or {}).keys():
                assert one[token].logprob == pytest.approx(two[token].logprob, abs=1e-4)


def test_transformers_modules_on_the_device_are_those_of_the_cpu(tiny_model: Callable[[str], Any]):
    directory, params = str(tiny_model("llama-mqa").directory), SamplingParams(temperature=0, max_tokens=8)
    found = []
    for device in ("cuda", "cpu"):
        options = {"device": device, "dtype": "float32", "skip_tokenizer_init": True, "num_blocks": 64}
        with LLM(directory, model_impl="transformers", **options) as llm:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in random_prompts()], params)
            found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_offloaded_weights_give_the_same_tokens(
    tiny_model: Callable[[str], Any], tmp_path: Any, place: str, quantization: str | None
):
    directory, params = str(tiny_model("mixtral").directory), SamplingParams(temperature=0, max_tokens=8)
    prompts = [{"prompt_token_ids": prompt} for prompt in random_prompts()]
    found = []
    for options in ({}, {"offload": place, "offload_dir": str(tmp_path), "memory_gib": 0.25}):
        common = {"device": "cuda", "dtype": "float32", "skip_tokenizer_init": True, "quantization": quantization}
        with LLM(directory, **common, **options) as llm:
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert found[0] == found[1]


def test_int8_on_the_device_multiplies_by_its_own_values():
    from paceline.formats import pack

    values, x = torch.randn(96, 64), torch.randn(5, 64)
    weight = pack(values, "int8", dtype=torch.bfloat16, device="cuda")
    exact = x.double() @ weight.unpack().double().cpu().T
    found = weight.matmul(x.to("cuda", torch.bfloat16)).double().cpu()
    assert (found - exact).norm() <= 2**-7 * exact.norm()


def test_close_gives_the_memory_back(tiny_model: Callable[[str], Any]):
    directory = str(tiny_model("llama").directory)
    before = torch.cuda.memory_allocated()
    with LLM(directory, device="cuda", skip_tokenizer_init=True, kv_cache_gib=0.25) as llm:
        output = llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(temperature=0, max_tokens=4))[0]
        assert len(output.outputs[0].token_ids) == 4
        assert torch.cuda.memory_allocated() - before >= 2**23  # 64 contexts of 512 tokens: 9.4 MB
        del output
    gc.collect()
    assert torch.cuda.memory_allocated() == before
