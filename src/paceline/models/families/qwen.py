"""Qwen2, Qwen2.5 (biased q, k and v) and Qwen3 (normalised q and k), dense (Qwen Team, 2024 and 2025)."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig
from paceline.models.family import Family, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim, read_windows
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    qwen3 = "Qwen3ForCausalLM" in hf.require("architectures")
    heads, hidden, layers = (hf.size(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = hf.size("head_dim", 128) if qwen3 else read_head_dim(hf, hidden, heads)
    rope = read_rope(hf, head_dim)
    bias = hf.get("attention_bias", False) if qwen3 else True
    window = hf.optional("sliding_window", 4096)
    window = window if hf.get("use_sliding_window", False) else None
    full_layers = hf.get("max_window_layers", 28)
    kinds = [
        "full_attention" if window is None or layer < full_layers else "sliding_attention" for layer in range(layers)
    ]
    return DecoderConfig(
        family="qwen",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_position=read_max_position(hf, rope, 32768),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.size("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias and qwen3,
            qk_norm="head" if qwen3 else None,
        ),
        rope=rope,
        mlp=MlpConfig(hf.size("intermediate_size"), read_activation(hf, "hidden_act", "silu")),
        norm=NormConfig(eps=hf.get("rms_norm_eps", 1e-6)),
        windows=read_windows(hf, kinds, window),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


FAMILY = Family("qwen", ("Qwen2ForCausalLM", "Qwen3ForCausalLM"), decoder_config, hugging_face_names)
