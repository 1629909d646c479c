"""OPT (Zhang et al., 2022) and Galactica, which share a definition; not OPT-350m, whose norms come after the adds."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig
from paceline.errors import UnsupportedModelError
from paceline.models.family import Family, Names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim

LAYER = "model.decoder.layers.{i}."


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden = hf.size("num_attention_heads"), hf.size("hidden_size")
    head_dim, bias = read_head_dim(hf, hidden, heads), hf.get("enable_bias", True)
    if hf.size("word_embed_proj_dim", hidden) != hidden:
        raise UnsupportedModelError(
            f"config.json sets 'word_embed_proj_dim' to {hf.require('word_embed_proj_dim')}, not the hidden size "
            f"{hidden}: paceline does not implement projected embeddings for this model"
        )
    return DecoderConfig(
        family="opt",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=hf.size("num_hidden_layers"),
        max_position=hf.size("max_position_embeddings", 2048),
        learned_position_offset=2,
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
        ),
        rope=None,
        mlp=MlpConfig(hf.size("ffn_dim"), read_activation(hf, "activation_function", "relu"), bias=bias, gated=False),
        norm=NormConfig(eps=1e-5, kind="layer", bias=True),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def names(config: DecoderConfig) -> Names:
    return {
        "embedding": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "attention_norm": f"{LAYER}self_attn_layer_norm",
        "attention.qkv": tuple(f"{LAYER}self_attn.{name}_proj" for name in "qkv"),
        "attention.out": f"{LAYER}self_attn.out_proj",
        "mlp_norm": f"{LAYER}final_layer_norm",
        "mlp.up": f"{LAYER}fc1",
        "mlp.down": f"{LAYER}fc2",
        "norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
    }


FAMILY = Family("opt", ("OPTForCausalLM",), decoder_config, names)
