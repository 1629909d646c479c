"""The GGUF dialect's tensor names, and what each architecture's writer did to the values, two-way.

Names: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight` in Hugging Face checkpoints, which is what
the rest of paceline speaks. Values: files of architecture "llama" hold the rows of q and k in interleaved rotary order
(pairs 2j, 2j+1), ours in half-split order (pairs j, j + head_dim/2); files of Gemma hold 1 + w for a norm's w.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
UNIT_OFFSET_NORMS = ("gemma2", "gemma3")  # architectures whose stored norms have the 1 added
INTERLEAVED_ROPE = ("llama",)  # architectures whose q and k rows are permuted
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's frequency divisors: configuration, not a weight (gguf_config.py)

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SANDWICH_NAMES = {
    **LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def layer_names(architecture: str) -> Mapping[str, str]:
    """GGUF name within a layer -> Hugging Face name within a layer."""
    return SANDWICH_NAMES if architecture in ("gemma2", "gemma3") else LAYER_NAMES


def to_hf(architecture: str, name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, or None if the architecture has no such tensor."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    ours = layer_names(architecture).get(match[2]) if match else None
    return f"model.layers.{match[1]}.{ours}.{suffix}" if match and ours else None


def to_gguf(architecture: str, name: str) -> str | None:
    """The inverse of to_hf()."""
    stem, _, suffix = name.rpartition(".")
    for theirs, ours in GLOBAL_NAMES.items():
        if stem == ours:
            return f"{theirs}.{suffix}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    for theirs, ours in layer_names(architecture).items():
        if match and match[2] == ours:
            return f"blk.{match[1]}.{theirs}.{suffix}"
    return None


def rope_heads(architecture: str, name: str, num_heads: int, num_kv_heads: int) -> int | None:
    """How many heads the rows of a GGUF tensor hold in interleaved rotary order; None if they are in plain order."""
    if architecture not in INTERLEAVED_ROPE:
        return None
    if ".attn_q." in name:
        return num_heads
    return num_kv_heads if ".attn_k." in name else None


def has_unit_offset(architecture: str, name: str) -> bool:
    """True for a norm stored as 1 + w."""
    return architecture in UNIT_OFFSET_NORMS and name.endswith("norm.weight")
