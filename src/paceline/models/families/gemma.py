"""Gemma 2 (soft caps) and the text model of Gemma 3 (normalised q and k, two rotary bases): Gemma Team, 2024, 2025."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig, ResidualConfig, RopeConfig
from paceline.models.family import Family, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_windows
from paceline.models.hf_rope import read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    gemma3 = "Gemma3ForCausalLM" in hf.require("architectures")
    hf.optional("hidden_act")  # stands beside hidden_activation in old files; transformers too goes by the latter
    hidden, layers, head_dim = hf.size("hidden_size"), hf.size("num_hidden_layers"), hf.size("head_dim", 256)
    bias = hf.get("attention_bias", False)
    pattern = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", 6)) if gemma3 else 2
    kinds = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    if gemma3:
        rope = read_rope(hf, head_dim, layer_type="full_attention", default_theta=1e6)
        window_rope: RopeConfig | None = read_rope(
            hf, head_dim, layer_type="sliding_attention", theta_key="rope_local_base_freq"
        )
    else:
        rope, window_rope = read_rope(hf, head_dim), None
    return DecoderConfig(
        family="gemma",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_position=hf.size("max_position_embeddings", 131072 if gemma3 else 8192),
        attention=AttentionConfig(
            num_heads=hf.size("num_attention_heads"),
            num_kv_heads=hf.size("num_key_value_heads"),
            head_dim=head_dim,
            scale=hf.size("query_pre_attn_scalar", 256) ** -0.5,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="head" if gemma3 else None,
            # For Gemma 3 the key is not asked for, so only null passes: transformers ignores it there.
            soft_cap=None if gemma3 else hf.optional("attn_logit_softcapping", 50.0),
        ),
        rope=rope,
        window_rope=window_rope,
        mlp=MlpConfig(hf.size("intermediate_size"), read_activation(hf, "hidden_activation", "gelu_pytorch_tanh")),
        norm=NormConfig(eps=hf.get("rms_norm_eps", 1e-6), unit_offset=True),
        residual=ResidualConfig(post_norms=True),
        windows=read_windows(hf, kinds, hf.optional("sliding_window", 4096)),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        embedding_scale=hidden**0.5,
        logit_soft_cap=hf.optional("final_logit_softcapping", None if gemma3 else 30.0),
    )


FAMILY = Family("gemma", ("Gemma2ForCausalLM", "Gemma3ForCausalLM"), decoder_config, hugging_face_names)
