"""MPT (MosaicML, 2023): ALiBi, no bias anywhere, norms included."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig
from paceline.errors import UnsupportedModelError
from paceline.models.family import Family, Names
from paceline.models.hf_config import HFConfig, read_head_dim

LAYER = "transformer.blocks.{i}."


def decoder_config(hf: HFConfig) -> DecoderConfig:
    hidden = hf.size(hf.spelling("d_model", "hidden_size"))
    heads = hf.size(hf.spelling("n_heads", "num_attention_heads"))
    head_dim = read_head_dim(hf, hidden, heads)
    attention = HFConfig(hf.get("attn_config", {}))
    if not attention.get("alibi", True):
        raise UnsupportedModelError("config.json's 'attn_config' sets 'alibi' to False: paceline reads no MPT without")
    scale = attention.get("softmax_scale", head_dim**-0.5)
    attention.check()
    hf.optional("learned_pos_emb")  # true in every file, and without effect where there is ALiBi
    return DecoderConfig(
        family="mpt",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=hf.size(hf.spelling("n_layers", "num_hidden_layers")),
        max_position=hf.size("max_seq_len", 2048),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=head_dim, scale=scale, alibi=1.0),
        rope=None,
        mlp=MlpConfig(hf.size("expansion_ratio", 4) * hidden, "gelu", gated=False),
        norm=NormConfig(eps=hf.get("layer_norm_epsilon", 1e-5), kind="layer"),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def names(config: DecoderConfig) -> Names:
    return {
        "embedding": "transformer.wte",
        "attention_norm": f"{LAYER}norm_1",
        "attention.qkv": f"{LAYER}attn.Wqkv",
        "attention.out": f"{LAYER}attn.out_proj",
        "mlp_norm": f"{LAYER}norm_2",
        "mlp.up": f"{LAYER}ffn.up_proj",
        "mlp.down": f"{LAYER}ffn.down_proj",
        "norm": "transformer.norm_f",
        "head": "lm_head",
    }


FAMILY = Family("mpt", ("MptForCausalLM", "MPTForCausalLM"), decoder_config, names, prefix="transformer.")
