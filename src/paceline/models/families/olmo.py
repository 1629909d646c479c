"""OLMo 2 (OLMo Team, 2025: norms after each half instead of before, q and k normalised over all heads at once) and
OLMo 3 (2025: the same with windows on three layers of four, whose rotary embedding is not scaled)."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig, ResidualConfig, RopeConfig
from paceline.models.family import Family, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim, read_windows
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    olmo3 = "Olmo3ForCausalLM" in hf.require("architectures")
    heads, hidden, layers = (hf.size(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = read_head_dim(hf, hidden, heads)
    bias = hf.get("attention_bias", False)
    if olmo3:
        rope = read_rope(hf, head_dim, layer_type="full_attention", default_theta=5e5)
        window_rope: RopeConfig | None = read_rope(hf, head_dim, layer_type="sliding_attention", default_theta=5e5)
        kinds = ["sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in range(layers)]
        windows = read_windows(hf, kinds, hf.optional("sliding_window", 4096))
    else:
        rope, window_rope, windows = read_rope(hf, head_dim), None, ()
    return DecoderConfig(
        family="olmo",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_position=read_max_position(hf, rope, 2048),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.size("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="projection",
        ),
        rope=rope,
        window_rope=window_rope,
        mlp=MlpConfig(hf.size("intermediate_size"), read_activation(hf, "hidden_act", "silu")),
        norm=NormConfig(eps=hf.get("rms_norm_eps", 1e-5)),
        residual=ResidualConfig(pre_norms=False, post_norms=True),
        windows=windows,
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


FAMILY = Family("olmo", ("Olmo2ForCausalLM", "Olmo3ForCausalLM"), decoder_config, hugging_face_names)
