"""What a config.json may get wrong, one error each: named, with what was expected."""

from __future__ import annotations

import pytest

from paceline.errors import CheckpointError, UnsupportedModelError, UsageError
from paceline.models.registry import read_decoder_config


@pytest.fixture
def mistral_config(llama_config):
    return {**llama_config, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


@pytest.fixture
def moe_config(llama_config):
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return {**llama_config, **moe, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def test_a_hidden_size_that_heads_cannot_share(mistral_config):
    with pytest.raises(CheckpointError, match=r"hidden size 32 is not a multiple of its 5 attention heads.*'head_dim'"):
        read_decoder_config({**mistral_config, "num_attention_heads": 5, "num_key_value_heads": 5})
    with_head_dim = {**mistral_config, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8}
    assert read_decoder_config(with_head_dim).attention.head_dim == 8


def test_heads_that_key_heads_cannot_share(mistral_config):
    with pytest.raises(UsageError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        read_decoder_config({**mistral_config, "num_key_value_heads": 3})


@pytest.mark.parametrize("window", [0, -1, 4096.0, "4096", True])
def test_a_window_that_is_no_length(mistral_config, window):
    with pytest.raises(CheckpointError, match=r"'sliding_window' to .*positive whole number"):
        read_decoder_config({**mistral_config, "sliding_window": window})


def test_layers_with_a_window_of_no_length(mistral_config):
    with pytest.raises(CheckpointError, match="no 'sliding_window'"):
        read_decoder_config({**mistral_config, "layer_types": ["sliding_attention", "full_attention"]})


def test_windows_on_some_layers(mistral_config):
    listed = {**mistral_config, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    assert read_decoder_config(listed).windows == (16, None)


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"])
@pytest.mark.parametrize("value", [0, -2, 1.5])
def test_experts_that_are_none(moe_config, key, value):
    with pytest.raises(CheckpointError, match=f"'{key}' to {value}: expected a positive whole number"):
        read_decoder_config({**moe_config, key: value})


def test_more_active_experts_than_there_are(moe_config):
    with pytest.raises(UsageError, match=r"5 active experts of 4.*num_experts_per_tok"):
        read_decoder_config({**moe_config, "num_experts_per_tok": 5})


def test_which_layers_have_experts(moe_config):
    deep = {**moe_config, "num_hidden_layers": 6}
    moe = read_decoder_config({**deep, "decoder_sparse_step": 2, "mlp_only_layers": [3]}).moe
    assert moe is not None
    assert moe.layers == (1, 5)
    assert read_decoder_config({**deep, "mlp_only_layers": [0, 1, 2, 3, 4, 5]}).moe is None


def test_a_short_list_of_rotated_layers(llama_config):
    smollm3 = {**llama_config, "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4}
    with pytest.raises(CheckpointError, match="3 'no_rope_layers' for 4 layers"):
        read_decoder_config({**smollm3, "no_rope_layers": [1, 1, 0]})
    assert read_decoder_config(smollm3).no_rope_layers == (3,)


def test_norms_of_single_heads_are_refused_by_name(llama_config):
    stablelm = {**llama_config, "architectures": ["StableLmForCausalLM"], "partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedModelError, match="'qk_layernorm' to True"):
        read_decoder_config({**stablelm, "qk_layernorm": True})
