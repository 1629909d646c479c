"""GPT-NeoX-20B (Black et al., 2022) and Pythia (Biderman et al., 2023): attention and MLP side by side."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig, ResidualConfig
from paceline.models.family import Family, Names, by_key_head
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim
from paceline.models.hf_rope import read_max_position, read_rope

LAYER = "gpt_neox.layers.{i}."


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden = hf.size("num_attention_heads"), hf.size("hidden_size")
    head_dim, bias = read_head_dim(hf, hidden, heads), hf.get("attention_bias", True)
    rope = read_rope(hf, head_dim, theta_key="rotary_emb_base", partial_key="rotary_pct", default_partial=0.25)
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=hf.size("num_hidden_layers"),
        max_position=read_max_position(hf, rope, 2048),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
        ),
        rope=rope,
        mlp=MlpConfig(hf.size("intermediate_size"), read_activation(hf, "hidden_act", "gelu"), bias=True, gated=False),
        norm=NormConfig(eps=hf.get("layer_norm_eps", 1e-5), kind="layer", bias=True),
        residual=ResidualConfig(parallel=hf.get("use_parallel_residual", True)),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def names(config: DecoderConfig) -> Names:
    return {
        "embedding": "gpt_neox.embed_in",
        "attention_norm": f"{LAYER}input_layernorm",
        "attention.qkv": by_key_head(f"{LAYER}attention.query_key_value", config),
        "attention.out": f"{LAYER}attention.dense",
        "mlp_norm": f"{LAYER}post_attention_layernorm",
        "mlp.up": f"{LAYER}mlp.dense_h_to_4h",
        "mlp.down": f"{LAYER}mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    }


FAMILY = Family("gpt_neox", ("GPTNeoXForCausalLM",), decoder_config, names, prefix="gpt_neox.")
