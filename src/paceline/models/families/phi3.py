"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini, dense (Abdin et al., 2024): q, k and v one tensor, gate and up another."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig
from paceline.models.family import Family, Names, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim, read_windows
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden, layers = (hf.size(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = read_head_dim(hf, hidden, heads)
    rope = read_rope(hf, head_dim, partial_key="partial_rotary_factor")
    window = hf.optional("sliding_window")
    kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    return DecoderConfig(
        family="phi3",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_position=read_max_position(hf, rope, 4096),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.size("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
        ),
        rope=rope,
        mlp=MlpConfig(hf.size("intermediate_size"), read_activation(hf, "hidden_act", "silu")),
        norm=NormConfig(eps=hf.get("rms_norm_eps", 1e-5)),
        windows=read_windows(hf, kinds, window),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def names(config: DecoderConfig) -> Names:
    layer = "model.layers.{i}."
    return {
        **hugging_face_names(config),
        "attention.qkv": f"{layer}self_attn.qkv_proj",
        "mlp.gate_up": f"{layer}mlp.gate_up_proj",
    }


FAMILY = Family("phi3", ("Phi3ForCausalLM",), decoder_config, names)
