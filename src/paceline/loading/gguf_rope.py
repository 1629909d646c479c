"""How GGUF says that rotary frequencies are stretched, as the `rope_scaling` of a config.json.

Linear and YaRN (Peng et al., 2023) are metadata, `rope.scaling.*`. Llama 3's rule is a tensor of the divisors that
follow from it, rope_freqs.weight, and LongRoPE (Ding et al., 2024) two of them, for short and for long contexts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from paceline.errors import UnsupportedModelError
from paceline.loading.gguf_metadata import Metadata, shortest_float32
from paceline.loading.gguf_names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS

# Llama 3.1's rule (its head_dim-independent constants); the files store only the divisors that follow from it.
LLAMA3_RULE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_scaling(
    metadata: Metadata, factors: Mapping[str, Sequence[float]], theta: float, dim: int
) -> dict[str, Any] | None:
    """`factors`: the values of those of ROPE_FACTORS, LONG_FACTORS and SHORT_FACTORS that the file has, `dim`: of a
    head's elements those that are rotated.

    Raises UnsupportedModelError for a kind or a parameter that config.json has no words for.
    """
    if ROPE_FACTORS in factors:
        return llama3_scaling(metadata.path, factors[ROPE_FACTORS], theta, dim)
    if LONG_FACTORS in factors or SHORT_FACTORS in factors:
        return _longrope(metadata, factors, dim)
    kind = metadata.text("rope.scaling.type", "none")
    if kind == "none":
        factor = metadata.number("rope.scale_linear", 1.0)  # how files of 2023 said it
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number("rope.scaling.factor")}
    if kind == "yarn":
        return _yarn(metadata)
    raise UnsupportedModelError(
        f"{metadata.path}: metadata key '{metadata.architecture}.rope.scaling.type' is {kind[:40]!r}: "
        "without its factors only 'none', 'linear' and 'yarn' are known; use the model's safetensors files"
    )


def _yarn(metadata: Metadata) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": metadata.number("rope.scaling.factor")}
    scaling["original_max_position_embeddings"] = metadata.integer("rope.scaling.original_context_length")
    names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
    for theirs, ours in names.items():
        if metadata.has(f"rope.scaling.{theirs}"):
            scaling[ours] = metadata.number(f"rope.scaling.{theirs}")
    return scaling


def _longrope(metadata: Metadata, factors: Mapping[str, Sequence[float]], dim: int) -> dict[str, Any]:
    metadata.text("rope.scaling.type", "longrope")
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for ours, theirs in (("short_factor", SHORT_FACTORS), ("long_factor", LONG_FACTORS)):
        if len(factors.get(theirs, ())) != dim // 2:
            raise UnsupportedModelError(
                f"{metadata.path}: LongRoPE needs {dim // 2} factors in '{theirs}', the file has "
                f"{len(factors.get(theirs, ()))}; convert it again"
            )
        scaling[ours] = [shortest_float32(factor) for factor in factors[theirs]]
    if metadata.has("rope.scaling.attn_factor"):
        stored = metadata.number("rope.scaling.attn_factor")
        context, original = metadata.integer("context_length"), metadata.integer("rope.scaling.original_context_length")
        if not math.isclose(stored, longrope_attention_factor(context, original), rel_tol=1e-5):
            scaling["attention_factor"] = stored
    return scaling


def longrope_attention_factor(context: int, original: int) -> float:
    """What LongRoPE multiplies sines and cosines by unless config.json says otherwise."""
    return math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original > 1 else 1.0


def llama3_factors(factor: float, theta: float, head_dim: int) -> list[float]:
    """What Llama 3.1's rule divides each of the head_dim/2 rotary frequencies by: 1, `factor`, or between the two."""
    low, high, original = (float(value) for value in LLAMA3_RULE.values())
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        keep = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - keep) / factor + keep))
    return factors


def llama3_scaling(path: object, stored: Sequence[float], theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 `rope_scaling` whose divisors are `stored`, the values of rope_freqs.weight.

    The slowest frequency is divided by the whole factor. All others must then follow from the published constants, to
    1e-4 (float32 rounding is 1e-7; another original context or factor moves some divisor by more than 1e-2).
    """
    factor = shortest_float32(max(stored, default=1.0))
    expected = llama3_factors(factor, theta, head_dim)
    if len(stored) != len(expected) or any(
        not math.isclose(a, b, rel_tol=1e-4) for a, b in zip(stored, expected, strict=False)
    ):
        raise UnsupportedModelError(
            f"{path}: the rotary factors in rope_freqs.weight do not follow Llama 3.1's rule (factor {factor:g})"
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_RULE}
