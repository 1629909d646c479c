"""Mistral 7B (Jiang et al., 2023; a sliding window on every layer in v0.1), Nemo, Small, and Ministral (windows on the
layers that the file lists)."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig
from paceline.models.family import Family, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim, read_windows
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden, layers = (hf.size(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = read_head_dim(hf, hidden, heads)
    rope = read_rope(hf, head_dim)
    window = hf.optional("sliding_window", 4096)
    kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    return DecoderConfig(
        family="mistral",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_position=read_max_position(hf, rope, 131072),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.size("num_key_value_heads", 8),
            head_dim=head_dim,
            scale=head_dim**-0.5,
        ),
        rope=rope,
        mlp=MlpConfig(hf.size("intermediate_size"), read_activation(hf, "hidden_act", "silu")),
        norm=NormConfig(eps=hf.get("rms_norm_eps", 1e-6)),
        windows=read_windows(hf, kinds, window),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


FAMILY = Family("mistral", ("MistralForCausalLM", "MinistralForCausalLM"), decoder_config, hugging_face_names)
