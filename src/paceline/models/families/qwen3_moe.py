"""Qwen3 with a mixture of experts on some or all layers (Qwen Team, 2025): 30B-A3B, 235B-A22B, Coder."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, MoeConfig, NormConfig
from paceline.models.family import Family, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim, read_windows
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden, layers = (hf.size(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = read_head_dim(hf, hidden, heads)
    rope = read_rope(hf, head_dim)
    bias = hf.get("attention_bias", False)
    hf.optional("max_window_layers")  # here windows are of all layers or of none
    window = hf.optional("sliding_window", 4096)
    window = window if hf.get("use_sliding_window", False) else None
    kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    return DecoderConfig(
        family="qwen3_moe",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_position=read_max_position(hf, rope, 32768),
        attention=AttentionConfig(
            heads, hf.size("num_key_value_heads", 4), head_dim, head_dim**-0.5, bias, out_bias=bias, qk_norm="head"
        ),
        rope=rope,
        mlp=MlpConfig(hf.size("intermediate_size"), read_activation(hf, "hidden_act", "silu")),
        moe=read_moe(hf, layers),
        norm=NormConfig(eps=hf.get("rms_norm_eps", 1e-6)),
        windows=read_windows(hf, kinds, window),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def read_moe(hf: HFConfig, num_layers: int) -> MoeConfig | None:
    """None where no layer has experts."""
    every, dense = hf.size("decoder_sparse_step", 1), hf.optional("mlp_only_layers") or []
    moe = MoeConfig(
        num_experts=hf.size("num_experts", hf.size("num_local_experts", 128)),  # transformers 4's name, and 5's
        experts_per_token=hf.size("num_experts_per_tok", 8),
        intermediate_size=hf.size("moe_intermediate_size", 768),
        layers=tuple(layer for layer in range(num_layers) if (layer + 1) % every == 0 and layer not in dense),
        normalize=hf.get("norm_topk_prob", False),
    )
    return moe if moe.layers else None


FAMILY = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), decoder_config, hugging_face_names)
