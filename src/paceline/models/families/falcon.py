"""Falcon (Almazrouei et al., 2023): 7B with one key head and one norm a layer, 40B and 180B ("new decoder") with key
groups and two norms, 11B with key groups and one norm, RefinedWeb 1B with ALiBi and one half after the other.

ALiBi stays float32 here; transformers rounds slope * position to bfloat16, steps of 2 past 256.
"""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig, ResidualConfig
from paceline.models.family import Family, Names, by_key_head
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim
from paceline.models.hf_rope import read_max_position, read_rope

LAYER = "transformer.h.{i}."


def decoder_config(hf: HFConfig) -> DecoderConfig:
    hidden = hf.size(hf.spelling("hidden_size", "n_embed"))
    heads = hf.size(hf.spelling("num_attention_heads", "n_head"))
    new, bias, alibi = (hf.get(key, False) for key in ("new_decoder_architecture", "bias", "alibi"))
    grouped, multi_query = hf.size("num_kv_heads", heads), hf.get("multi_query", True)
    kv_heads = grouped if new else 1 if multi_query else heads
    parallel = hf.get("parallel_attn", True) or new
    norms = hf.get("num_ln_in_parallel_attn", 2 if new else 1)
    head_dim, activation = read_head_dim(hf, hidden, heads), read_activation(hf, "activation", "gelu")
    scale, rope = head_dim**-0.5, read_rope(hf, head_dim)
    return DecoderConfig(
        family="falcon",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=hf.size(hf.spelling("num_hidden_layers", "n_layer")),
        max_position=read_max_position(hf, rope, 2048),
        attention=AttentionConfig(
            heads, kv_heads, head_dim, scale, qkv_bias=bias, out_bias=bias, alibi=scale if alibi else None
        ),
        rope=None if alibi else rope,
        mlp=MlpConfig(hf.size("ffn_hidden_size", 4 * hidden), activation, bias, gated=False),
        norm=NormConfig(eps=hf.get("layer_norm_epsilon", 1e-5), kind="layer", bias=True),
        residual=ResidualConfig(parallel=parallel, shared_norm=parallel and norms == 1),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def names(config: DecoderConfig) -> Names:
    two_norms = config.residual.parallel and not config.residual.shared_norm
    return {
        "embedding": "transformer.word_embeddings",
        "attention_norm": f"{LAYER}{'ln_attn' if two_norms else 'input_layernorm'}",
        "attention.qkv": by_key_head(f"{LAYER}self_attention.query_key_value", config),
        "attention.out": f"{LAYER}self_attention.dense",
        "mlp_norm": f"{LAYER}{'ln_mlp' if two_norms else 'post_attention_layernorm'}",
        "mlp.up": f"{LAYER}mlp.dense_h_to_4h",
        "mlp.down": f"{LAYER}mlp.dense_4h_to_h",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }


FAMILY = Family("falcon", ("FalconForCausalLM",), decoder_config, names, prefix="transformer.")
