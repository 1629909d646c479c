"""Mixtral 8x7B and 8x22B (Jiang et al., 2024): Mistral with a mixture of experts in place of every MLP."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, MoeConfig, NormConfig
from paceline.models.family import Family, Names, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim, read_windows
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden, layers = (hf.size(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = read_head_dim(hf, hidden, heads)
    rope = read_rope(hf, head_dim, default_theta=1e6)
    inner, window = hf.size("intermediate_size"), hf.optional("sliding_window")
    kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    return DecoderConfig(
        family="mixtral",
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
        mlp=MlpConfig(inner, read_activation(hf, "hidden_act", "silu")),
        moe=MoeConfig(
            num_experts=hf.size("num_local_experts", 8),
            experts_per_token=hf.size("num_experts_per_tok", 2),
            intermediate_size=inner,
            layers=tuple(range(layers)),
        ),
        norm=NormConfig(eps=hf.get("rms_norm_eps", 1e-5)),
        windows=read_windows(hf, kinds, window),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def names(config: DecoderConfig) -> Names:
    moe = "model.layers.{i}.block_sparse_moe."
    return {
        **hugging_face_names(config),
        "mlp.router": f"{moe}gate",
        "mlp.experts.{e}.gate_up": (f"{moe}experts.{{e}}.w1", f"{moe}experts.{{e}}.w3"),
        "mlp.experts.{e}.down": f"{moe}experts.{{e}}.w2",
    }


FAMILY = Family("mixtral", ("MixtralForCausalLM",), decoder_config, names)
