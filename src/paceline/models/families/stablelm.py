"""StableLM 3B and StableLM 2 1.6B (Bellagente et al., 2024): layer norms, a quarter of each head rotated."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig, ResidualConfig
from paceline.models.family import Family, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden = hf.size("num_attention_heads"), hf.size("hidden_size")
    head_dim = read_head_dim(hf, hidden, heads)
    rope = read_rope(hf, head_dim, partial_key="partial_rotary_factor", default_partial=0.25)
    parallel = hf.get("use_parallel_residual", False)
    return DecoderConfig(
        family="stablelm",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=hf.size("num_hidden_layers"),
        max_position=read_max_position(hf, rope, 4096),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.size("num_key_value_heads", 32),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=hf.get("use_qkv_bias", False),
        ),
        rope=rope,
        mlp=MlpConfig(hf.size("intermediate_size"), read_activation(hf, "hidden_act", "silu")),
        norm=NormConfig(eps=hf.get("layer_norm_eps", 1e-5), kind="layer", bias=True),
        residual=ResidualConfig(parallel=parallel, shared_norm=parallel),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


FAMILY = Family("stablelm", ("StableLmForCausalLM",), decoder_config, hugging_face_names)
