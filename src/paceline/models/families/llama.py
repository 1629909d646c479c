"""Llama 1, 2 and 3.x (Touvron et al., 2023; Grattafiori et al., 2024), and what shares its layout, as SmolLM2 does."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig
from paceline.models.family import Family, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden = hf.size("num_attention_heads"), hf.size("hidden_size")
    head_dim = read_head_dim(hf, hidden, heads)
    rope = read_rope(hf, head_dim)
    bias = hf.get("attention_bias", False)
    return DecoderConfig(
        family="llama",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=hf.size("num_hidden_layers"),
        max_position=read_max_position(hf, rope, 2048),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.size("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
        ),
        rope=rope,
        mlp=MlpConfig(
            intermediate_size=hf.size("intermediate_size"),
            activation=read_activation(hf, "hidden_act", "silu"),
            bias=hf.get("mlp_bias", False),
        ),
        norm=NormConfig(eps=hf.get("rms_norm_eps", 1e-6)),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


FAMILY = Family("llama", ("LlamaForCausalLM",), decoder_config, hugging_face_names)
