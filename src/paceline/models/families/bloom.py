"""BLOOM and BLOOMZ (BigScience Workshop, 2022): ALiBi, and a norm right after the embedding."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig
from paceline.models.family import Family, Names, by_key_head
from paceline.models.hf_config import HFConfig, read_head_dim

LAYER = "transformer.h.{i}."


def decoder_config(hf: HFConfig) -> DecoderConfig:
    hidden = hf.size(hf.spelling("hidden_size", "n_embed"))
    heads = hf.size(hf.spelling("n_head", "num_attention_heads"))
    head_dim = read_head_dim(hf, hidden, heads)
    return DecoderConfig(
        family="bloom",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=hf.size(hf.spelling("n_layer", "num_hidden_layers")),
        max_position=hf.size("seq_length", 2048),  # the trained length; most files leave it out
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=True,
            out_bias=True,
            alibi=1.0,
        ),
        rope=None,
        mlp=MlpConfig(hf.size("n_inner", 4 * hidden), "gelu_tanh", bias=True, gated=False),
        norm=NormConfig(eps=hf.get("layer_norm_epsilon", 1e-5), kind="layer", bias=True),
        embedding_norm=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def names(config: DecoderConfig) -> Names:
    return {
        "embedding": "transformer.word_embeddings",
        "embedding_norm": "transformer.word_embeddings_layernorm",
        "attention_norm": f"{LAYER}input_layernorm",
        "attention.qkv": by_key_head(f"{LAYER}self_attention.query_key_value", config),
        "attention.out": f"{LAYER}self_attention.dense",
        "mlp_norm": f"{LAYER}post_attention_layernorm",
        "mlp.up": f"{LAYER}mlp.dense_h_to_4h",
        "mlp.down": f"{LAYER}mlp.dense_4h_to_h",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }


FAMILY = Family("bloom", ("BloomForCausalLM",), decoder_config, names, prefix="transformer.")
