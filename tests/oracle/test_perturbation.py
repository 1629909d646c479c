"""Every field of DecoderConfig matters: change one and parity with transformers breaks, or the model is refused.

The fields are found by walking the dataclasses, so a new one fails here until it says where it matters. A field whose
change goes unnoticed is a field the tiny checkpoints do not exercise, and their parity would prove nothing about it.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
import torch

from paceline import reference
from paceline.config import DecoderConfig, RopeConfig, RopeScaling
from paceline.errors import CheckpointError
from paceline.models.load import load_decoder

BROKEN = 1e-3  # ten times the bound of parity

# field -> (the tiny model on which it matters, the value to put in its place)
PERTURBED: dict[str, tuple[str, Any]] = {
    "vocab_size": ("llama", 95),
    "hidden_size": ("llama", 32),
    "num_layers": ("llama", 2),
    "attention.num_heads": ("llama", 2),
    "attention.num_kv_heads": ("llama", 4),
    "attention.head_dim": ("llama-head-dim", 8),
    "attention.scale": ("llama", 0.2),
    "attention.qkv_bias": ("qwen2", False),
    "attention.out_bias": ("llama-bias", False),
    "attention.qk_norm": ("qwen3", None),
    "attention.soft_cap": ("gemma2", None),
    "attention.alibi": ("falcon-rw", 1.0),
    "rope.theta": ("llama", 5e3),
    "rope.dim": ("llama", 6),
    "rope.scaling.kind": ("llama-llama3", "linear"),
    "rope.scaling.factor": ("llama-linear", 3.0),
    "rope.scaling.low_freq_factor": ("llama-llama3", 2.0),
    "rope.scaling.high_freq_factor": ("llama-llama3", 6.0),
    "rope.scaling.original_max_position": ("llama-llama3", 96),
    "rope.scaling.beta_fast": ("llama-yarn", 4.0),
    "rope.scaling.beta_slow": ("llama-yarn", 2.0),
    "rope.scaling.truncate": ("llama-yarn", False),
    "rope.scaling.attention_factor": ("llama-yarn", 1.0),
    "rope.scaling.short_factors": ("phi3-longrope", (1.0, 1.2, 1.8)),
    "rope.scaling.long_factors": ("phi3-longrope-long", (1.5, 4.0, 6.0)),
    "rope.scaling.context": ("llama-dynamic-long", 40),
    "mlp.intermediate_size": ("llama", 64),
    "mlp.activation": ("llama-gelu", "silu"),
    "mlp.bias": ("llama-bias", False),
    "mlp.gated": ("gpt2", True),
    "moe.num_experts": ("mixtral", 4),
    "moe.experts_per_token": ("mixtral", 1),
    "moe.intermediate_size": ("qwen3-moe", 32),
    "moe.layers": ("qwen3-moe-mixed", (1, 3)),
    "moe.normalize": ("qwen3-moe", True),
    "norm.eps": ("llama", 0.02),
    "norm.kind": ("bloom", "rms"),
    "norm.bias": ("gpt2", False),
    "norm.unit_offset": ("gemma2", False),
    "residual.pre_norms": ("olmo2", True),
    "residual.post_norms": ("gemma2", False),
    "residual.parallel": ("gpt-neox", False),
    "residual.shared_norm": ("gpt-neox", True),
    "residual.multiplier": ("granite", 1.0),
    "windows": ("qwen2-window", (None, 6, None)),
    "window_rope.theta": ("gemma3", 200.0),
    "window_rope.dim": ("gemma3", 12),
    "window_rope.scaling.kind": ("gemma3", "linear"),
    "window_rope.scaling.factor": ("gemma3", 2.0),
    "window_rope.scaling.low_freq_factor": ("gemma3", 2.0),
    "window_rope.scaling.high_freq_factor": ("gemma3", 6.0),
    "window_rope.scaling.original_max_position": ("gemma3", 96),
    "window_rope.scaling.beta_fast": ("gemma3", 2.0),
    "window_rope.scaling.beta_slow": ("gemma3", 4.0),
    "window_rope.scaling.truncate": ("gemma3", False),
    "window_rope.scaling.attention_factor": ("gemma3", 1.2),
    "window_rope.scaling.short_factors": ("gemma3", (1.0,) * 8),
    "window_rope.scaling.long_factors": ("gemma3", (1.0,) * 8),
    "window_rope.scaling.context": ("gemma3", 32),
    "no_rope_layers": ("smollm3", (0,)),
    "learned_position_offset": ("opt", 1),
    "tie_embeddings": ("llama", True),
    "embedding_scale": ("gemma2", 6.0),
    "embedding_norm": ("bloom", False),
    "logit_scale": ("granite", 1.0),
    "logit_soft_cap": ("gemma2", None),
}

NO_EFFECT = {
    "family": "names the family for the weight rules; its value is looked up, not computed with",
    "max_position": "bounds the context that the engine admits; rotary angles are computed for any position",
}

# The reference takes these from the shapes of the tensors; the Decoder's loader compares the two.
IMPLIED_BY_SHAPES = {"vocab_size", "hidden_size", "mlp.intermediate_size", "moe.intermediate_size"}

# No released Gemma 3 scales the rope of its windowed layers. The tiny one gets a scaling that does nothing (linear, by
# 1) or one of a kind that reads the field to start from, which is compared with itself and not with transformers.
FACTORS = tuple(1.0 + i / 4 for i in range(8))
SCALED_WINDOW: dict[str, RopeScaling] = {
    **dict.fromkeys(("beta_fast", "beta_slow", "truncate"), RopeScaling("yarn", 8.0, original_max_position=64)),
    "short_factors": RopeScaling("longrope", 8.0, original_max_position=64, short_factors=FACTORS),
    "long_factors": RopeScaling("longrope", 8.0, original_max_position=8, long_factors=FACTORS, context=23),
    "context": RopeScaling("dynamic", 8.0, original_max_position=8),
}
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def leaves(kind: type, prefix: str = "") -> list[str]:
    """The dotted names of all fields of a dataclass, those of nested dataclasses (optional or not) in their place."""
    names = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = [t for t in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(t)]
        names += leaves(inner[0], f"{prefix}{field.name}.") if inner else [f"{prefix}{field.name}"]
    return names


def replaced(config: Any, name: str, value: Any) -> Any:
    """`config` with the field of this dotted name replaced."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: replaced(getattr(config, first), rest, value) if rest else value})


def decoder_logits(tiny, config, pages, prompt):
    """None where the loader refuses, or the family has no name for what is to be loaded."""
    try:
        decoder = load_decoder(tiny.checkpoint, config, dtype=torch.float32)
    except (CheckpointError, KeyError):
        return None
    return pages(decoder, [prompt]).run()[0]


def reference_logits(tiny, config, pages, prompt):
    """None where torch refuses to multiply: the reference checks nothing itself."""
    try:
        return reference.forward(reference.load(tiny.checkpoint, config), prompt, reference.Cache())
    except (RuntimeError, KeyError):
        return None


def test_every_field_is_perturbed_or_excused():
    assert sorted(leaves(DecoderConfig)) == sorted([*PERTURBED, *NO_EFFECT])


def test_the_walk_finds_nested_and_optional_fields():
    assert {"family", "rope.dim", "rope.scaling.factor", "window_rope.theta"} <= set(leaves(DecoderConfig))
    assert leaves(RopeConfig) == [
        "theta",
        "dim",
        *(f"scaling.{field.name}" for field in dataclasses.fields(RopeScaling)),
    ]


@pytest.mark.parametrize(
    ("name", "logits_of"),
    [(name, decoder_logits) for name in PERTURBED]
    + [(name, reference_logits) for name in PERTURBED if name not in IMPLIED_BY_SHAPES],
)
def test_perturbing_a_field_breaks_parity(name, logits_of, tiny_model, pages, prompts, relative_error):
    variant, value = PERTURBED[name]
    tiny, prompt, config = tiny_model(variant), prompts[-1], tiny_model(variant).config
    expected = tiny.hf_logits(prompt)
    if name.startswith("window_rope.scaling."):
        config = replaced(config, "window_rope.scaling", SCALED_WINDOW.get(name.split(".")[-1], LLAMA3))
        expected = logits_of(tiny, config, pages, prompt)
    assert relative_error(logits_of(tiny, config, pages, prompt), expected) <= 1e-4
    found = logits_of(tiny, replaced(config, name, value), pages, prompt)
    assert found is None or relative_error(found, expected) > BROKEN
