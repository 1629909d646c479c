"""The default model's real weights on a GPU: the CPU's tokens in float32, and sensible answers in every format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.llm import LLM
from paceline.sampling.params import SamplingParams

pytestmark = [pytest.mark.default_model, pytest.mark.gpu]

PROMPTS = (
    "Why is the sky blue?",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Shopping list:\n1. Milk\n2. Eggs\n3.",
    "Once upon a time, in a village by the sea, there lived",
    "one two three one two three one two three one two",
)
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def on_cpu(default_model_gguf: Path) -> Iterator[LLM]:
    with LLM(str(default_model_gguf), device="cpu", dtype="float32", max_model_len=512) as made:
        yield made


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_float32_tokens_are_the_cpus(default_model_gguf, on_cpu, mode):
    expected = [output.outputs[0].token_ids for output in on_cpu.generate(PROMPTS, greedy(64))]
    with LLM(str(default_model_gguf), device="cuda", dtype="float32", max_model_len=512, mode=mode) as on_gpu:
        together = on_gpu.generate(PROMPTS, greedy(64))
        alone = [on_gpu.generate(prompt, greedy(64))[0] for prompt in PROMPTS]
    assert [output.outputs[0].token_ids for output in together] == expected
    assert [output.outputs[0].token_ids for output in alone] == expected


# Of 57 prefixes of plain text, how many have the likeliest next token that float32 on the CPU finds.
@pytest.mark.parametrize(("quantization", "least"), [(None, 0.9), ("int8", 0.8), ("fp8", 0.75), ("int4", 0.45)])
def test_each_format_answers_sensibly(default_model_gguf, on_cpu, quantization, least):
    text = "The sun rises in the east and sets in the west. Water boils at one hundred degrees. " * 2
    ids = on_cpu.get_tokenizer().encode(text)
    prompts = [ids[:end] for end in range(8, len(ids), 3)]
    expected = on_cpu.generate(prompts, greedy(1))
    options = {"device": "cuda", "dtype": "bfloat16", "quantization": quantization, "max_model_len": 512}
    with LLM(str(default_model_gguf), **options) as on_gpu:
        found = [on_gpu.generate(prompt, greedy(1))[0] for prompt in prompts]
        answer = on_gpu.chat(QUESTION, {"temperature": 0, "max_tokens": 60})[0].outputs[0]
    same = [a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(expected, found, strict=True)]
    assert sum(same) >= least * len(same)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
