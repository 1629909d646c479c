"""Three independent ways to the same logits: transformers, the reference, and the Decoder over a paged cache."""

from __future__ import annotations

import pytest
import torch

from paceline import reference

BOUND = 1e-4  # relative, float32


def test_reference_agrees_with_transformers(each_model, prompts, relative_error):
    model = reference.load(each_model.checkpoint, each_model.config)
    for prompt in prompts:
        found = reference.forward(model, prompt, reference.Cache())
        assert relative_error(found, each_model.hf_logits(prompt)) <= BOUND


def test_reference_in_chunks_equals_whole(each_model, prompts, relative_error):
    model = reference.load(each_model.checkpoint, each_model.config)
    prompt = prompts[-1]
    whole = reference.forward(model, prompt, reference.Cache())
    cache = reference.Cache()
    parts = [reference.forward(model, chunk, cache) for chunk in (prompt[:1], prompt[1:9], prompt[9:])]
    assert relative_error(torch.cat(parts), whole) <= BOUND


@pytest.mark.parametrize("chunk", [None, 7, 1])
def test_decoder_agrees_with_transformers(each_model, prompts, pages, relative_error, chunk):
    """Uneven prompts in one batch; whole, in chunks of 7, and one token at a time (which is decoding)."""
    found = pages(each_model.decoder(), prompts).run(chunk)
    for logits, prompt in zip(found, prompts, strict=True):
        assert relative_error(logits, each_model.hf_logits(prompt)) <= BOUND


def test_generate_is_greedy_and_stops(tiny_model, prompts):
    tiny = tiny_model("llama")
    model = reference.load(tiny.checkpoint, tiny.config)
    prompt = prompts[1]
    expected = tiny.hf.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()[len(prompt) :]
    assert reference.generate(model, prompt, 12) == expected
    stop = expected[4]
    assert reference.generate(model, prompt, 12, stop=frozenset({stop})) == expected[: expected.index(stop) + 1]


def test_generate_hands_the_chooser_the_path(tiny_model, prompts):
    tiny = tiny_model("llama")
    model = reference.load(tiny.checkpoint, tiny.config)
    seen: list[list[int]] = []

    def second(logits_V: torch.Tensor, tokens: list[int]) -> int:
        seen.append(list(tokens))
        return int(logits_V.topk(2).indices[1])

    chosen = reference.generate(model, prompts[1], 3, second)
    assert seen == [[*prompts[1], *chosen[:i]] for i in range(3)]
    assert chosen[0] == int(tiny.hf_logits(prompts[1])[-1].topk(2).indices[1])
