"""StarCoder2 (Lozhkov et al., 2024): layer norms, biases and a plain MLP with rotary, grouped, windowed attention."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig
from paceline.models.family import Family, Names, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim, read_windows
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden, layers = (hf.size(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = read_head_dim(hf, hidden, heads)
    rope, window, bias = read_rope(hf, head_dim), hf.optional("sliding_window"), hf.get("use_bias", True)
    kind = "full_attention" if window is None else "sliding_attention"
    return DecoderConfig(
        family="starcoder2",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_position=read_max_position(hf, rope, 4096),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.size("num_key_value_heads", 2),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
        ),
        rope=rope,
        mlp=MlpConfig(
            hf.size("intermediate_size"), read_activation(hf, "hidden_act", "gelu_pytorch_tanh"), bias=bias, gated=False
        ),
        norm=NormConfig(eps=hf.get("norm_epsilon", 1e-5), kind="layer", bias=True),
        windows=read_windows(hf, [kind] * layers, window),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def names(config: DecoderConfig) -> Names:
    layer = "model.layers.{i}."
    return {**hugging_face_names(config), "mlp.up": f"{layer}mlp.c_fc", "mlp.down": f"{layer}mlp.c_proj"}


FAMILY = Family("starcoder2", ("Starcoder2ForCausalLM",), decoder_config, names)
