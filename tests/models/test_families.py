"""The families whose keys are not Llama's: what an absent key means, what two spellings are, what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from paceline.config import ResidualConfig, RopeConfig
from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.models.registry import read_decoder_config

CONFIGS = Path(__file__).parent / "configs"

# Architecture -> transformers' config class, and the keys without which nobody knows the model.
SIZES = {
    "GPT2LMHeadModel": ("GPT2Config", ("n_embd", "n_head", "n_layer")),
    "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", ("n_embd", "n_head", "n_layer")),
    "GPTNeoXForCausalLM": (
        "GPTNeoXConfig",
        ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"),
    ),
    "OPTForCausalLM": ("OPTConfig", ("hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_dim")),
    "FalconForCausalLM": ("FalconConfig", ("hidden_size", "num_attention_heads", "num_hidden_layers")),
    "BloomForCausalLM": ("BloomConfig", ("hidden_size", "n_head", "n_layer")),
    "MptForCausalLM": ("MptConfig", ("d_model", "n_heads", "n_layers")),
    "Starcoder2ForCausalLM": (
        "Starcoder2Config",
        ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"),
    ),
}


def published(name: str, **changes: object) -> dict[str, object]:
    return {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}


def written_by_transformers(architecture: str) -> dict[str, object]:
    """A config of transformers with every default spelled out."""
    import transformers

    config = getattr(transformers, SIZES[architecture][0])()
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [architecture]}


@pytest.mark.parametrize("architecture", SIZES)
def test_absent_keys_mean_what_transformers_means(architecture, caplog):
    full = written_by_transformers(architecture)
    sizes = {key: full[key] for key in ("architectures", "vocab_size", *SIZES[architecture][1])}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        spelled_out = read_decoder_config(full)
        assert dataclasses.asdict(read_decoder_config(sizes)) == dataclasses.asdict(spelled_out)
    assert not caplog.records


@pytest.mark.parametrize(
    ("architecture", "key"), [(architecture, key) for architecture, (_, keys) in SIZES.items() for key in keys]
)
def test_a_missing_size_is_named(architecture, key):
    full = written_by_transformers(architecture)
    del full[key]
    with pytest.raises(CheckpointError, match=f"no '{key}'"):
        read_decoder_config(full)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("gpt2", "n_embd", "hidden_size"),
        ("gpt2", "n_head", "num_attention_heads"),
        ("gpt2", "n_layer", "num_hidden_layers"),
        ("gpt2", "n_positions", "max_position_embeddings"),
        ("bloom-560m", "n_embed", "hidden_size"),
        ("bloom-560m", "num_attention_heads", "n_head"),
        ("falcon-7b", "hidden_size", "n_embed"),
        ("falcon-7b", "num_hidden_layers", "n_layer"),
        ("mpt-7b", "d_model", "hidden_size"),
        ("mpt-7b", "n_heads", "num_attention_heads"),
    ],
)
def test_two_spellings_are_one_and_may_not_disagree(name, old, new):
    hf = published(name)
    expected = read_decoder_config(hf)
    assert read_decoder_config({**hf, new: hf[old]}) == expected
    with pytest.raises(CheckpointError, match=f"'{new}'"):
        read_decoder_config({**hf, new: 3})
    value = hf.pop(old)
    assert read_decoder_config({**hf, new: value}) == expected


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "reorder_and_upcast_attn", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "activation_function", "quick_gelu"),
        ("opt-125m", "do_layer_norm_before", False),
        ("opt-125m", "_remove_final_layer_norm", True),
        ("opt-125m", "layer_norm_elementwise_affine", False),
        ("opt-125m", "word_embed_proj_dim", 512),
        ("bloom-560m", "apply_residual_connection_post_layernorm", True),
        ("mpt-7b", "no_bias", False),
        ("mpt-7b", "norm_type", "rmsnorm"),
        ("mpt-7b", "logit_scale", 0.5),
        ("starcoder2-3b", "mlp_type", "gated"),
    ],
)
def test_a_switch_that_is_not_implemented_is_refused_by_name(name, key, value):
    with pytest.raises(UnsupportedModelError, match=key):
        read_decoder_config(published(name, **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", False),
        ("alibi_bias_max", 16),
        ("attn_type", "multiquery_attention"),
        ("clip_qkv", 6),
        ("prefix_lm", True),
        ("qk_ln", True),
    ],
)
def test_mpts_attention_is_judged_too(key, value):
    attention = {**published("mpt-7b")["attn_config"], key: value}
    with pytest.raises(UnsupportedModelError, match=key):
        read_decoder_config(published("mpt-7b", attn_config=attention))


def test_opt_350m_and_mpt_storywriter_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"'word_embed_proj_dim' to 512, not the hidden size 1024"):
        read_decoder_config(published("opt-350m"))
    with pytest.raises(UnsupportedModelError, match="alibi_bias_max"):
        read_decoder_config(published("mpt-7b-storywriter"))


def test_pythia_of_transformers_4_and_5_are_one():
    old = published("pythia-160m")
    new = {key: value for key, value in old.items() if key not in ("rotary_emb_base", "rotary_pct")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
    assert read_decoder_config(old).rope == RopeConfig(1e4, 16)
    assert read_decoder_config(new) == read_decoder_config(old)


def test_falcons_differ_in_key_heads_norms_and_positions():
    shared, apart = ResidualConfig(parallel=True, shared_norm=True), ResidualConfig(parallel=True)
    expected = {
        "falcon-7b": (1, shared, None),
        "falcon-40b": (8, apart, None),
        "falcon-180b": (8, apart, None),
        "falcon-11b": (8, shared, None),
        "falcon-rw-1b": (32, ResidualConfig(), 64**-0.5),
    }
    for name, facts in expected.items():
        config = read_decoder_config(published(name))
        assert (config.attention.num_kv_heads, config.residual, config.attention.alibi) == facts
        assert (config.rope is None) == (config.attention.alibi is not None)
        assert config.attention.qkv_bias == config.mlp.bias == (name == "falcon-rw-1b")


def test_lengths_are_those_the_models_were_trained_for():
    lengths = {"gpt2": 1024, "opt-125m": 2048, "bloom-560m": 2048, "mpt-30b": 8192, "falcon-11b": 8192}
    for name, length in {**lengths, "starcoder": 8192, "starcoder2-3b": 16384, "pythia-160m": 2048}.items():
        assert read_decoder_config(published(name)).max_position == length
    assert set(read_decoder_config(published("starcoder2-3b")).windows) == {4096}
