"""Granite 3 and 4 dense (IBM, 2024): Llama with four multipliers, of the embeddings, scores, residuals and logits."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig, ResidualConfig
from paceline.models.family import Family, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden = hf.size("num_attention_heads"), hf.size("hidden_size")
    head_dim = read_head_dim(hf, hidden, heads)
    rope = read_rope(hf, head_dim)
    bias = hf.get("attention_bias", False)
    return DecoderConfig(
        family="granite",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=hf.size("num_hidden_layers"),
        max_position=read_max_position(hf, rope, 2048),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.size("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=float(hf.get("attention_multiplier", 1.0)),
            qkv_bias=bias,
            out_bias=bias,
        ),
        rope=rope,
        mlp=MlpConfig(
            hf.size("intermediate_size"), read_activation(hf, "hidden_act", "silu"), bias=hf.get("mlp_bias", False)
        ),
        norm=NormConfig(eps=hf.get("rms_norm_eps", 1e-6)),
        residual=ResidualConfig(multiplier=float(hf.get("residual_multiplier", 1.0))),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        embedding_scale=float(hf.get("embedding_multiplier", 1.0)),
        logit_scale=1 / hf.get("logits_scaling", 1.0),
    )


FAMILY = Family("granite", ("GraniteForCausalLM",), decoder_config, hugging_face_names)
