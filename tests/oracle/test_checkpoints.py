"""Checkpoints as the hub has them: without the causal model's prefix, and with tensors that old releases stored."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from paceline import reference
from paceline.errors import CheckpointError
from paceline.models.load import load_decoder
from paceline.models.registry import family_of


def with_tensors(checkpoint, tensors):
    changed = object.__new__(type(checkpoint))
    changed.config, changed.tensors = checkpoint.config, tensors
    return changed


@pytest.mark.parametrize("name", ["gpt2", "gpt-bigcode", "gpt-neox", "opt", "falcon-40b", "bloom", "mpt", "starcoder2"])
def test_a_bare_models_checkpoint_is_read(name, tiny_model, prompts, pages, relative_error, caplog):
    """GPT-2's, BLOOM's and OPT's files on the hub leave "transformer." and "model." out."""
    tiny = tiny_model(name)
    prefix = family_of(tiny.config).prefix
    stripped = {key.removeprefix(prefix): values for key, values in tiny.checkpoint.tensors.items()}
    assert len(stripped.keys() - tiny.checkpoint.tensors.keys()) > 10
    bare = with_tensors(tiny.checkpoint, stripped)
    prompt = prompts[-1]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        decoder = load_decoder(bare, tiny.config, dtype=torch.float32)
    assert not caplog.records
    assert relative_error(pages(decoder, [prompt]).run()[0], tiny.hf_logits(prompt)) <= 1e-4
    found = reference.forward(reference.load(bare, tiny.config), prompt, reference.Cache())
    assert relative_error(found, tiny.hf_logits(prompt)) <= 1e-4


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("gpt2", ["h.0.attn.bias", "h.2.attn.masked_bias"]),
        (
            "gpt-neox",
            [
                "gpt_neox.layers.1.attention.bias",
                "gpt_neox.layers.1.attention.masked_bias",
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
            ],
        ),
        ("opt", ["lm_head.weight"]),
    ],
)
def test_what_old_releases_stored_is_passed_over(name, buffers, tiny_model, caplog):
    """Causal masks, frequencies and a copy of the tied head are no parameters; any other tensor is named."""
    tiny = tiny_model(name)
    tensors = {**tiny.checkpoint.tensors, **{key: torch.ones(1, 1, 4, 4) for key in buffers}}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_decoder(with_tensors(tiny.checkpoint, tensors), tiny.config, dtype=torch.float32)
        assert not caplog.records
        tensors["h.0.attn.weight"] = torch.ones(3)
        load_decoder(with_tensors(tiny.checkpoint, tensors), tiny.config, dtype=torch.float32)
    assert "h.0.attn.weight" in caplog.text


def test_the_shape_of_a_transposed_tensor_is_the_files(tiny_model):
    tiny = tiny_model("gpt2")
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors = {**tiny.checkpoint.tensors, name: tiny.checkpoint.tensors[name].T}
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[192, 48\], expected \[48, 192\]"):
        load_decoder(with_tensors(tiny.checkpoint, tensors), tiny.config, dtype=torch.float32)


def test_a_position_table_of_another_length_is_refused(tiny_model):
    tiny = tiny_model("opt")
    longer = dataclasses.replace(tiny.config, max_position=tiny.config.max_position + 1)
    with pytest.raises(CheckpointError, match=r"embed_positions\.weight' has shape \[514, 48\], expected \[515, 48\]"):
        load_decoder(tiny.checkpoint, longer, dtype=torch.float32)
