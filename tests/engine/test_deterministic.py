"""`deterministic`: what it refuses, and that an LLM has it. tests/oracle/test_deterministic.py compares the bits."""

from __future__ import annotations

import random

import pytest

from paceline import LLM, SamplingParams, UsageError
from paceline.formats.invariant import InvariantWeight
from paceline.kernels import explain

PARAMS = SamplingParams(temperature=0.7, seed=4, max_tokens=6, ignore_eos=True, logprobs=3)
PROMPTS = [[random.Random(seed).randrange(3, 29) for _ in range(9 + 7 * seed)] for seed in range(5)]


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_an_llm_answers_alike_alone_and_among_others(tiny_directory, quantization):
    with LLM(str(tiny_directory), device="cpu", dtype="float32", deterministic=True, quantization=quantization) as llm:
        together = [output.outputs[0] for output in llm.generate(PROMPTS, PARAMS)]
        for prompt, expected in zip(PROMPTS, together, strict=True):
            (found,) = llm.generate(prompt, PARAMS)[0].outputs
            assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
        assert "torch, keys in one order" in {one.kernel for one in explain(llm)}
        assert all("8 rows at a time" in one.kernel for one in explain(llm) if one.operation.startswith("down"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "compile"}, "deterministic runs plainly.*leave out mode='compile'"),
        ({"mode": "graph"}, "deterministic runs plainly.*leave out mode='graph'"),
        ({"offload": "host"}, "deterministic multiplies a few rows at a time.*leave out offload"),
        ({"model_impl": "transformers"}, "deterministic: transformers' own modules run this model"),
    ],
)
def test_what_is_refused(tiny_directory, options, message):
    with pytest.raises(UsageError, match=message):
        LLM(str(tiny_directory), device="cpu", dtype="float32", deterministic=True, **options)


def test_a_library_whose_products_differ_is_told(tiny_directory, monkeypatch):
    monkeypatch.setattr(InvariantWeight, "refusal", lambda self: "3 of 8 equal rows come out different")
    with pytest.raises(UsageError, match=r"deterministic: blocks.0.attention.qkv on cpu: 3 of 8 equal rows"):
        LLM(str(tiny_directory), device="cpu", dtype="float32", deterministic=True)
