"""Contexts past the length that a rotary embedding was trained for: its factors are fixed when the model is loaded."""

from __future__ import annotations

import pytest
import torch

from paceline import LLM, SamplingParams, reference
from paceline.models.load import load_decoder
from paceline.models.registry import read_decoder_config

BOUND = 1e-4  # relative, float32
TRAINED, LONG = 16, 23  # tokens: what the tiny models were trained for, and what they are loaded for
PAST = ["llama-dynamic-long", "phi3-longrope-long"]


@pytest.mark.parametrize("name", PAST)
def test_a_prompt_of_the_length_loaded_for_has_transformers_logits(name, tiny_model, prompts, pages, relative_error):
    tiny, prompt = tiny_model(name), prompts[-1]
    assert len(prompt) == LONG > TRAINED
    expected = tiny.hf_logits(prompt)
    found = reference.forward(reference.load(tiny.checkpoint, tiny.config), prompt, reference.Cache())
    assert relative_error(found, expected) <= BOUND
    for chunk in (None, 7, 1):
        assert relative_error(pages(tiny.decoder(), [prompt]).run(chunk)[0], expected) <= BOUND


@pytest.mark.parametrize("name", PAST)
def test_a_model_not_loaded_for_it_differs(name, tiny_model, prompts, pages, relative_error):
    tiny, prompt = tiny_model(name), prompts[-1]
    decoder = load_decoder(tiny.checkpoint, read_decoder_config(tiny.checkpoint.config), dtype=torch.float32)
    assert relative_error(pages(decoder, [prompt]).run()[0], tiny.hf_logits(prompt)) > 100 * BOUND


@pytest.mark.parametrize("name", PAST)
def test_early_keys_stay_valid_past_the_trained_length(name, tiny_model, prompts, pages, relative_error):
    """One token at a time from the first on, across the trained length: as the same tokens in one forward."""
    tiny, tokens = tiny_model(name), prompts[-1]
    whole = pages(tiny.decoder(), [tokens]).run()[0]
    steps = pages(tiny.decoder(), [tokens]).run(1)[0]
    assert relative_error(steps, whole) <= BOUND
    short = pages(tiny.decoder(), [tokens[: TRAINED - 4]]).run()[0]
    assert relative_error(short, whole[: TRAINED - 4]) <= BOUND


@pytest.mark.parametrize("name", ["llama-yarn", "llama-linear", "llama-llama3"])
def test_kinds_that_follow_no_length_ignore_it(name, tiny_model):
    config = tiny_model(name).config
    decoders = [
        load_decoder(tiny_model(name).checkpoint, c, dtype=torch.float32) for c in (config, config.with_context(500))
    ]
    assert torch.equal(*(decoder.rotaries[0].signed_D for decoder in decoders))


def test_an_llm_loaded_for_more_than_the_trained_length_answers_as_transformers(tiny_model, prompts):
    """LongRoPE has the same factors at every length past the trained one, so all of an answer can be compared."""
    tiny, prompt = tiny_model("phi3-longrope-long"), prompts[-1]
    expected = tiny.hf.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()[len(prompt) :]
    options = {"skip_tokenizer_init": True, "dtype": "float32", "device": "cpu", "kv_cache_gib": 0.001}
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(tiny.directory), max_model_len=64, **options) as llm:
        found = llm.generate([{"prompt_token_ids": prompt}], params)[0].outputs[0].token_ids
    assert list(found) == expected
