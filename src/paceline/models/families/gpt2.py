"""GPT-2 (Radford et al., 2019) and StarCoder's GPTBigCode (Li et al., 2023), mostly with one key head."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig
from paceline.loading.rules import Layout, Stored
from paceline.models.family import Family, Names, by_key_head
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim

LAYER = "transformer.h.{i}."


def decoder_config(hf: HFConfig) -> DecoderConfig:
    big_code = "GPTBigCodeForCausalLM" in hf.require("architectures")
    hidden = hf.size(hf.spelling("n_embd", "hidden_size"))
    heads = hf.size(hf.spelling("n_head", "num_attention_heads"))
    head_dim = read_head_dim(hf, hidden, heads)
    kv_heads = 1 if big_code and hf.get("multi_query", True) else heads
    hf.optional("num_key_value_heads")  # written beside multi_query, which decides
    return DecoderConfig(
        family="gpt_bigcode" if big_code else "gpt2",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=hf.size(hf.spelling("n_layer", "num_hidden_layers")),
        max_position=hf.size(hf.spelling("n_positions", "max_position_embeddings"), 1024),
        learned_position_offset=0,
        attention=AttentionConfig(heads, kv_heads, head_dim, head_dim**-0.5, qkv_bias=True, out_bias=True),
        rope=None,
        mlp=MlpConfig(
            hf.size("n_inner", 4 * hidden),
            read_activation(hf, "activation_function", "gelu_pytorch_tanh" if big_code else "gelu_new"),
            bias=True,
            gated=False,
        ),
        norm=NormConfig(eps=hf.get("layer_norm_epsilon", 1e-5), kind="layer", bias=True),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def names(config: DecoderConfig) -> Names:
    """GPT-2 stores its matrices as [inputs, outputs]; GPTBigCode sorts q, k and v by head unless there is one key."""
    big_code = config.family == "gpt_bigcode"
    qkv = f"{LAYER}attn.c_attn"
    matrix = Layout(transposed=not big_code)
    return {
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "attention_norm": f"{LAYER}ln_1",
        "attention.qkv": by_key_head(qkv, config) if big_code else Stored((qkv,), matrix),
        "attention.out": Stored((f"{LAYER}attn.c_proj",), matrix),
        "mlp_norm": f"{LAYER}ln_2",
        "mlp.up": Stored((f"{LAYER}mlp.c_fc",), matrix),
        "mlp.down": Stored((f"{LAYER}mlp.c_proj",), matrix),
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }


FAMILY = Family("gpt2", ("GPT2LMHeadModel",), decoder_config, names, prefix="transformer.")
BIG_CODE = Family("gpt_bigcode", ("GPTBigCodeForCausalLM",), decoder_config, names, prefix="transformer.")
