"""The names of transformers that the loop stands on are where it looks for them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers import generation

from paceline.fusion.generate import transformers_names as names


def test_a_prepared_config_holds_its_tokens_as_tensors(encoder_decoders: dict[str, Any]) -> None:
    model = encoder_decoders["bart"]
    seen: list[Any] = []

    def loop(model: Any, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
        seen.append(prepared)
        return input_ids

    model.generate(torch.tensor([[5, 6, 2]]), eos_token_id=[2, 7], max_new_tokens=3, custom_generate=loop)
    config = seen[0]["generation_config"]
    ends, pad = names.end_tokens(config), names.pad_token(config)
    assert ends is not None
    assert pad is not None
    assert ends.tolist() == [2, 7]
    assert int(pad) == 1
    assert names.is_empty(seen[0]["past_key_values"])
    assert names.holds_plain_layers(seen[0]["past_key_values"])


def test_transformers_own_loops_take_prepared_arguments(encoder_decoders: dict[str, Any]) -> None:
    for beams in (False, True):
        loop = names.own_loop(encoder_decoders["t5"], beams)
        prepared = {"logits_processor": None, "stopping_criteria": None, "generation_config": None}
        inspect.signature(loop).bind(torch.zeros(1, 1), **prepared)


def test_hooks_are_names_of_the_generation_mixin() -> None:
    for hook in names.LOOP_HOOKS:
        assert hook == "_reorder_cache" or hasattr(generation.GenerationMixin, hook)


def test_caches_with_windows_or_states_are_told_apart() -> None:
    mistral = transformers.MistralConfig(num_hidden_layers=2, sliding_window=8)
    assert not names.holds_plain_layers(transformers.DynamicCache(config=mistral))
    assert names.holds_plain_layers(transformers.DynamicCache())


def test_an_output_class_for_every_kind_of_result() -> None:
    for encoder_decoder in (False, True):
        for beams in (False, True):
            fields = names.output_class(encoder_decoder, beams).__dataclass_fields__
            assert {"sequences", "scores", "logits", "past_key_values"} <= fields.keys()
