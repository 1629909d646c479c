"""The GGUF dialect's tensor names, and what each architecture's writer did to the values.

Names: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight` in Hugging Face checkpoints, which is what
the rest of paceline speaks. Values: what llama.cpp's convert_hf_to_gguf.py changes, an architecture at a time, and
what we therefore undo (gguf_layout.py). One that is not in ARCHITECTURES is refused: its writer may have done anything.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

# Configuration rather than weights, stored as tensors: see gguf_rope.py.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

IN_LAYER = re.compile(r"blk\.(\d+)\.(.+)")

# How the values of a tensor lie, where they do not lie as Hugging Face's:
# "query", "key": rows of a head in interleaved rotary order (pairs 2j, 2j+1), not half-split (j, j + head_dim/2).
# "fused": rows of all queries, all keys, all values; Hugging Face has a group's queries, its key, its value, a group
#     for each key-value head. "transposed": the other way round. "stacked": one tensor an index of the first dimension.
# "unit_offset": the norm's 1 + w, where Hugging Face has w.
Layout = Literal["query", "key", "fused", "transposed", "stacked", "unit_offset"]


@dataclass(frozen=True)
class Dialect:
    """An architecture's names without their ".weight" or ".bias", GGUF's to Hugging Face's: those outside the layers,
    and those within one after `prefix` and its number. "{e}" stands for the index of a stacked tensor.
    `layouts`: by GGUF's name within a layer, for weight and bias, but "transposed" and "stacked" for weights only."""

    names: Mapping[str, str]
    layers: Mapping[str, str]
    prefix: str = "model.layers"
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    unit_offset: bool = False  # of every norm

    @property
    def embedding(self) -> str:
        return f"{self.names['token_embd']}.weight"

    @property
    def head(self) -> str:
        return f"{self.names['output']}.weight"


LLAMA_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
INTERLEAVED: Mapping[str, Layout] = {"attn_q": "query", "attn_k": "key"}

LLAMA = Dialect(LLAMA_NAMES, LLAMA_LAYERS)
PERMUTED = replace(LLAMA, layouts=INTERLEAVED)
# "llama" with experts is Mixtral.
MIXTRAL = replace(
    PERMUTED,
    layers={
        **{key: name for key, name in LLAMA_LAYERS.items() if name[:4] != "mlp."},
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
    },
    layouts={**INTERLEAVED, "ffn_gate_exps": "stacked", "ffn_down_exps": "stacked", "ffn_up_exps": "stacked"},
)
QWEN3 = replace(LLAMA, layers={**LLAMA_LAYERS, **QK_NORMS})
QWEN3_MOE = replace(
    QWEN3,
    layers={
        **{key: name for key, name in QWEN3.layers.items() if name[:4] != "mlp."},
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
        "ffn_down_exps": "mlp.experts.{e}.down_proj",
        "ffn_up_exps": "mlp.experts.{e}.up_proj",
    },
    layouts={"ffn_gate_exps": "stacked", "ffn_down_exps": "stacked", "ffn_up_exps": "stacked"},
)
GEMMA = Dialect(
    LLAMA_NAMES,
    {
        **LLAMA_LAYERS,
        **QK_NORMS,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    unit_offset=True,
)
OLMO2 = Dialect(
    LLAMA_NAMES,
    {
        **{key: name for key, name in LLAMA_LAYERS.items() if not key.endswith("norm")},
        **QK_NORMS,
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
)
PHI3 = Dialect(
    LLAMA_NAMES,
    {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
)
STABLELM = Dialect(
    LLAMA_NAMES,
    {
        **LLAMA_LAYERS,
        "attn_q_norm": "self_attn.q_layernorm.norms.{e}",
        "attn_k_norm": "self_attn.k_layernorm.norms.{e}",
    },
    layouts={"attn_q_norm": "stacked", "attn_k_norm": "stacked"},
)
STARCODER2 = Dialect(
    LLAMA_NAMES,
    {
        **{key: name for key, name in LLAMA_LAYERS.items() if key != "ffn_gate"},
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
)
GPT2 = Dialect(
    {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    prefix="transformer.h",
    layouts=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "transposed"),
)
GPT_NEOX = Dialect(
    {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
    {
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    prefix="gpt_neox.layers",
    layouts={"attn_qkv": "fused"},
)
BLOOM = Dialect(
    {
        "token_embd": "transformer.word_embeddings",
        "token_embd_norm": "transformer.word_embeddings_layernorm",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attention.query_key_value",
        "attn_output": "self_attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    prefix="transformer.h",
    layouts={"attn_qkv": "fused"},
)
MPT = Dialect(
    {"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"},
    {
        "attn_norm": "norm_1",
        "attn_qkv": "attn.Wqkv",
        "attn_output": "attn.out_proj",
        "ffn_norm": "norm_2",
        "ffn_up": "ffn.up_proj",
        "ffn_down": "ffn.down_proj",
    },
    prefix="transformer.blocks",
)
FALCON = replace(
    BLOOM,
    names={key: name for key, name in BLOOM.names.items() if key != "token_embd_norm"},
    layers={key: name for key, name in BLOOM.layers.items() if key != "ffn_norm"},
)
# With a second norm (Falcon 40B), the first is the MLP's.
FALCON_TWO_NORMS = replace(FALCON, layers={**FALCON.layers, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"})

ARCHITECTURES: Mapping[str, Dialect] = {
    "llama": PERMUTED,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "qwen3moe": QWEN3_MOE,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": PHI3,
    "smollm3": PERMUTED,
    "granite": PERMUTED,
    "olmo2": OLMO2,
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
    "gpt2": GPT2,
    "gptneox": GPT_NEOX,
    "bloom": BLOOM,
    "falcon": FALCON,
    "mpt": MPT,
}


def dialect_of(architecture: str, tensors: Collection[str]) -> Dialect:
    """The dialect of a file of a known architecture that holds `tensors`."""
    if architecture == "llama" and "blk.0.ffn_gate_inp.weight" in tensors:
        return MIXTRAL
    if architecture == "falcon" and "blk.0.attn_norm_2.weight" in tensors:
        return FALCON_TWO_NORMS
    return ARCHITECTURES[architecture]


def to_hf(dialect: Dialect, name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, "{e}" left in it where it is stacked; None if it has no place."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    if stem in dialect.names:
        return f"{dialect.names[stem]}.{suffix}"
    match = IN_LAYER.fullmatch(stem)
    theirs = dialect.layers.get(match[2]) if match else None
    return f"{dialect.prefix}.{match[1]}.{theirs}.{suffix}" if match and theirs else None


def layout_of(dialect: Dialect, name: str) -> Layout | None:
    """How the values of a GGUF tensor lie; None if as Hugging Face's."""
    stem, _, suffix = name.rpartition(".")
    if dialect.unit_offset and stem.endswith("norm"):
        return "unit_offset"
    match = IN_LAYER.fullmatch(stem)
    layout = dialect.layouts.get(match[2]) if match else None
    return None if suffix == "bias" and layout in ("transposed", "stacked") else layout
