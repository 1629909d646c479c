from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from paceline.config import RopeConfig, RopeScaling
from paceline.errors import CheckpointError, PacelineError, UnsupportedModelError
from paceline.models.registry import ARCHITECTURES, FAMILIES, family_of, read_decoder_config

GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def test_every_architecture_leads_to_its_family():
    assert sum(len(family.architectures) for family in FAMILIES.values()) == len(ARCHITECTURES)  # none claimed twice
    for architecture, family in ARCHITECTURES.items():
        assert FAMILIES[family.name] is family
        assert architecture in family.architectures


def test_unknown_architecture_names_the_nearest(llama_config):
    llama_config["architectures"] = ["Qwen2MoeForCausalLM"]
    with pytest.raises(UnsupportedModelError, match=r"'Qwen2MoeForCausalLM'; did you mean 'Qwen3MoeForCausalLM'\?"):
        read_decoder_config(llama_config)


def test_no_architecture_is_an_error(llama_config):
    del llama_config["architectures"]
    with pytest.raises(CheckpointError, match="'architectures'"):
        read_decoder_config(llama_config)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
)
def test_missing_key_is_named(llama_config, key):
    del llama_config[key]
    with pytest.raises(CheckpointError, match=f"no '{key}'"):
        read_decoder_config(llama_config)


MOE = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}
WINDOWED = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 5}, "hidden size 32 is not a multiple of its 5 attention heads"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3: config.json is inconsistent"),
        ({**MOE, "num_experts_per_tok": 0}, "'num_experts_per_tok' to 0: expected a positive whole number"),
        ({**MOE, "num_local_experts": 0}, "'num_local_experts' to 0: expected a positive whole number"),
        ({**MOE, "num_experts_per_tok": 5}, "5 active experts of 4: config.json must name at least one"),
        (
            {**WINDOWED, **SLIDING, "sliding_window": None},
            "sliding attention and no 'sliding_window': it is incomplete",
        ),
        ({**WINDOWED, "sliding_window": 0}, "'sliding_window' to 0: expected a positive whole number"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' to '1e-5': expected a number"),
        ({"rms_norm_eps": True}, "'rms_norm_eps' to True: expected a number"),
        ({"rope_theta": [1]}, r"'rope_theta' to \[1\]: expected a number"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' to 'no': expected true or false"),
        ({"hidden_act": 3}, "'hidden_act' to 3: expected a string"),
        ({"rope_scaling": "linear"}, "'rope_scaling' to 'linear': expected an object"),
        ({**WINDOWED, "layer_types": 3}, "'layer_types' to 3: expected a list"),
    ],
)
def test_a_config_that_cannot_be_right_is_named(llama_config, changes, said):
    with pytest.raises(PacelineError, match=said) as refused:
        read_decoder_config({**llama_config, **changes})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [0, -4, "32", 32.0, True, [32]])
@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"])
def test_a_size_that_is_no_size_is_refused(llama_config, key, value):
    with pytest.raises(CheckpointError, match=f"'{key}' to .*positive whole number"):
        read_decoder_config({**llama_config, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 4096),
        ("partial_rotary_factor", 0.5),
        ("num_local_experts", 8),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("attn_logit_softcapping", 30.0),
        ("residual_multiplier", 0.22),
        ("hidden_act", "relu2"),
        ("rope_scaling", {"type": "proportional", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}),
    ],
)
def test_feature_that_changes_the_result_is_refused_by_name(llama_config, key, value):
    with pytest.raises(UnsupportedModelError, match=r"partial_rotary|rope_type" if "rope" in key else key):
        read_decoder_config({**llama_config, key: value})


def test_neutral_values_pass_in_silence_and_unknown_keys_are_logged(llama_config, caplog):
    quiet = {"sliding_window": None, "partial_rotary_factor": 1.0, "rope_interleaved": False, "unheard_of": None}
    with caplog.at_level(logging.WARNING):
        expected = read_decoder_config({**llama_config, **quiet})
        assert not caplog.records
        assert read_decoder_config({**llama_config, "unheard_of": 3}) == expected
    assert "unheard_of" in caplog.text


def test_old_and_new_spelling_of_rope_are_one(llama_config):
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = {**llama_config, "rope_theta": 5e5, "rope_scaling": {**scaling, "rope_type": "llama3"}}
    older = {**llama_config, "rope_theta": 5e5, "rope_scaling": {**scaling, "type": "llama3"}}
    new = {k: v for k, v in llama_config.items() if not k.startswith("rope")}
    new["rope_parameters"] = {**scaling, "rope_type": "llama3", "rope_theta": 5e5}
    expected = RopeConfig(5e5, 8, RopeScaling("llama3", 32.0, 1.0, 4.0, 64))
    assert [read_decoder_config(hf).rope for hf in (old, older, new)] == [expected] * 3


def test_gemma3_of_transformers_4_and_5_are_one():
    old = read_decoder_config(GEMMA3)
    assert old.rope == RopeConfig(1e6, 256, RopeScaling("linear", 8.0))
    assert old.window_rope == RopeConfig(1e4, 256)
    assert old.windows[:7] == (512, 512, 512, 512, 512, None, 512)
    new = {k: v for k, v in GEMMA3.items() if "rope" not in k and k != "sliding_window_pattern"}
    new["layer_types"] = ["sliding_attention" if window else "full_attention" for window in old.windows]
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert read_decoder_config(new) == old


def test_gemma3_refuses_a_cap_that_transformers_ignores():
    with pytest.raises(UnsupportedModelError, match="attn_logit_softcapping"):
        read_decoder_config({**GEMMA3, "attn_logit_softcapping": 50.0})


def test_gemma2_alternates_windows_from_the_first_layer():
    config = read_decoder_config({**GEMMA3, "architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 4})
    assert config.windows == (512, None, 512, None)


def test_layer_types_must_be_known_and_as_many_as_layers():
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        read_decoder_config({**GEMMA3, "layer_types": ["chunked_attention"] * 26})
    with pytest.raises(CheckpointError, match="3 'layer_types' for 26 layers"):
        read_decoder_config({**GEMMA3, "layer_types": ["full_attention"] * 3})


def test_qwen_windows_only_when_asked(llama_config):
    hf = {**llama_config, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "max_window_layers": 1}
    assert read_decoder_config(hf).windows == ()
    assert read_decoder_config({**hf, "use_sliding_window": True}).windows == (None, 16)


def transformers_defaults(name, llama_config):
    """A config of transformers, all keys it has at their defaults but the sizes."""
    import transformers

    sizes = {k: v for k, v in llama_config.items() if k.startswith(("num_", "hidden_size", "vocab"))}
    config = getattr(transformers, name)(**sizes)
    return json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("LlamaConfig", "LlamaForCausalLM"),
        ("Qwen2Config", "Qwen2ForCausalLM"),
        ("Qwen3Config", "Qwen3ForCausalLM"),
        ("Gemma2Config", "Gemma2ForCausalLM"),
        ("Gemma3TextConfig", "Gemma3ForCausalLM"),
        ("MistralConfig", "MistralForCausalLM"),
        ("MinistralConfig", "MinistralForCausalLM"),
        ("MixtralConfig", "MixtralForCausalLM"),
        ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
        ("Phi3Config", "Phi3ForCausalLM"),
        ("SmolLM3Config", "SmolLM3ForCausalLM"),
        ("Olmo2Config", "Olmo2ForCausalLM"),
        ("Olmo3Config", "Olmo3ForCausalLM"),
        ("GraniteConfig", "GraniteForCausalLM"),
        ("StableLmConfig", "StableLmForCausalLM"),
    ],
)
def test_absent_keys_mean_what_transformers_means(name, architecture, llama_config, caplog):
    """The config with every default spelled out and the same with only the sizes read alike; no key is unknown."""
    full = {**transformers_defaults(name, llama_config), "architectures": [architecture]}
    sizes = {
        k: full[k]
        for k in ("architectures", "vocab_size", "intermediate_size", *llama_config)
        if k.startswith(("num_", "hidden_size", "vocab", "intermediate", "architectures"))
    }
    with caplog.at_level(logging.WARNING):
        spelled_out = read_decoder_config(full)
    assert not [record for record in caplog.records if record.name.startswith("paceline")]
    assert dataclasses.asdict(read_decoder_config(sizes)) == dataclasses.asdict(spelled_out)


def test_family_of(llama_config):
    assert family_of(read_decoder_config(llama_config)) is FAMILIES["llama"]
