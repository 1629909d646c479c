"""SmolLM3 (Hugging Face, 2025): Llama whose every fourth layer has no position embedding (Kazemnejad et al., 2023)."""

from __future__ import annotations

from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig
from paceline.errors import CheckpointError
from paceline.models.family import Family, hugging_face_names
from paceline.models.hf_config import HFConfig, read_activation, read_head_dim, read_windows
from paceline.models.hf_rope import read_max_position, read_rope


def decoder_config(hf: HFConfig) -> DecoderConfig:
    heads, hidden, layers = (hf.size(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = read_head_dim(hf, hidden, heads)
    rope = read_rope(hf, head_dim, default_theta=2e6)
    bias = hf.get("attention_bias", False)
    interval = hf.size("no_rope_layer_interval", 4)
    # Despite its name, the file's list holds 1 for a layer that is rotated.
    rotated = hf.get("no_rope_layers", [(layer + 1) % interval != 0 for layer in range(layers)])
    if len(rotated) < layers:
        raise CheckpointError(
            f"config.json has {len(rotated)} 'no_rope_layers' for {layers} layers: it is inconsistent"
        )
    hf.optional("max_window_layers")  # stands in the file; which layers have windows follows from the rotated ones
    window = hf.optional("sliding_window")
    window = window if hf.get("use_sliding_window", False) else None
    kinds = ["full_attention" if window is None or rotated[i] else "sliding_attention" for i in range(layers)]
    return DecoderConfig(
        family="smollm3",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_position=read_max_position(hf, rope, 32768),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.size("num_key_value_heads", 4),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
        ),
        rope=rope,
        no_rope_layers=tuple(layer for layer in range(layers) if not rotated[layer]),
        mlp=MlpConfig(
            hf.size("intermediate_size"), read_activation(hf, "hidden_act", "silu"), bias=hf.get("mlp_bias", False)
        ),
        norm=NormConfig(eps=hf.get("rms_norm_eps", 1e-6)),
        windows=read_windows(hf, kinds, window),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


FAMILY = Family("smollm3", ("SmolLM3ForCausalLM",), decoder_config, hugging_face_names)
