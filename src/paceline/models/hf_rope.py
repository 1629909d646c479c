"""The rotary embedding that a config.json describes, in both spellings (transformers 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from paceline.config import RopeConfig, RopeKind, RopeScaling
from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.models.hf_config import NEUTRAL, HFConfig
from paceline.registry import unknown

ROPE_KINDS: Mapping[str, RopeKind] = {
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",  # its name in the first Phi-3 files
}
# "default" stretches nothing; for text alone multimodal rotary embedding gives a token's three positions one value.
UNSCALED_ROPE = ("default", "mrope")

# Keys of the rotary parameters that are read below, and, in the last line, those that change nothing for text alone.
ROPE_KEYS = frozenset(
    {
        *("attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor", "low_freq_factor"),
        *("mscale", "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor", "rope_theta"),
        *("rope_type", "short_factor", "truncate", "type"),
        *("finetuned", "max_position_embeddings", "mrope_interleaved", "mrope_section"),
    }
)


def read_rope(
    hf: HFConfig,
    head_dim: int,
    *,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    default_theta: float = 1e4,
    partial_key: str | None = None,
    default_partial: float = 1.0,
) -> RopeConfig:
    """The rotary embedding of all layers, or of those of `layer_type`.

    transformers 5 writes `rope_parameters` (nested by layer type where there are several); transformers 4 wrote the
    base under `theta_key` and, for the layers that are not windowed, `rope_scaling`. `partial_key`: where a family
    that turns only a part of each head says how much; for others a part is refused.
    """
    parameters: dict[str, Any] = dict(hf.get("rope_parameters", {}))
    if layer_type is not None:
        parameters = dict(parameters.get(layer_type) or {})
    if layer_type != "sliding_attention":
        parameters = {**hf.get("rope_scaling", {}), **parameters}
    HFConfig({key: value for key, value in parameters.items() if key not in ROPE_KEYS}).check()
    rope = HFConfig(parameters)
    dim = _rotated(hf, rope, head_dim, partial_key, default_partial)
    theta = rope.number("rope_theta", hf.number(theta_key, default_theta))
    original = hf.optional("original_max_position_embeddings")
    trained = rope.size("original_max_position_embeddings", original or hf.size("max_position_embeddings", 8192))
    return RopeConfig(theta, dim, _rope_scaling(hf, rope, trained, dim))


def _rotated(hf: HFConfig, rope: HFConfig, head_dim: int, partial_key: str | None, default: float) -> int:
    """The dimensions of a head that turn, an even number. `partial_key`, `default`: see read_rope."""
    if partial_key is not None:
        dim = int(head_dim * rope.number("partial_rotary_factor", hf.number(partial_key, default)))
    elif rope.optional("partial_rotary_factor") in NEUTRAL["partial_rotary_factor"]:
        dim = head_dim
    else:
        raise UnsupportedModelError(
            f"config.json sets 'partial_rotary_factor' to {rope.optional('partial_rotary_factor')!r}, "
            "which paceline does not implement for this model"
        )
    if dim % 2 or not 2 <= dim <= head_dim:
        raise CheckpointError(
            f"config.json rotates {dim} of the {head_dim} dimensions of a head, expected an even number of them: "
            "it is inconsistent"
        )
    return dim


def _rope_scaling(hf: HFConfig, rope: HFConfig, trained: int, dim: int) -> RopeScaling | None:
    """`trained`: the length that the rotary embedding was trained for, in tokens."""
    name = str(rope.optional("rope_type") or rope.optional("type") or "default")
    if name in UNSCALED_ROPE:
        return None
    if name not in ROPE_KINDS:
        known = [*ROPE_KINDS, *UNSCALED_ROPE]
        raise UnsupportedModelError(f"config.json's rotary embedding: {unknown('rope_type', name, known)}")
    kind = ROPE_KINDS[name]
    written = hf.size("max_position_embeddings", trained)
    # DeepSeek-V3 and Phi-3 leave the factor out: the ratio of the lengths says it.
    factor = rope.number("factor", written / trained if kind in ("yarn", "longrope") else None)
    match kind:
        case "linear":
            return RopeScaling(kind, factor)
        case "dynamic":
            return RopeScaling(kind, factor, original_max_position=written)
        case "yarn":
            return _read_yarn(rope, factor, trained)
        case "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if low >= high:
                raise CheckpointError(
                    f"config.json's 'low_freq_factor' {low} is not below its 'high_freq_factor' {high}: "
                    "it is inconsistent"
                )
            return RopeScaling(kind, factor, low, high, trained)
        case "longrope":
            return _read_longrope(rope, factor, trained, dim)


def _read_yarn(rope: HFConfig, factor: float, trained: int) -> RopeScaling:
    def lengthened(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = rope.optional("mscale"), rope.optional("mscale_all_dim")
    length = lengthened(over) / lengthened(under) if over and under else lengthened(1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position=trained,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.get("truncate", True),
        attention_factor=rope.number("attention_factor", length),
    )


def _read_longrope(rope: HFConfig, factor: float, trained: int, dim: int) -> RopeScaling:
    length = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return RopeScaling(
        "longrope",
        factor,
        original_max_position=trained,
        attention_factor=rope.number("attention_factor", length),
        short_factors=_factors(rope, "short_factor", dim // 2),
        long_factors=_factors(rope, "long_factor", dim // 2),
    )


def _factors(rope: HFConfig, key: str, count: int) -> tuple[float, ...]:
    values = rope.require(key)
    if not isinstance(values, list) or not all(isinstance(value, (int, float)) and value > 0 for value in values):
        raise CheckpointError(f"config.json's '{key}' is {str(values)[:40]}: expected a list of numbers above 0")
    if len(values) != count:
        raise CheckpointError(
            f"config.json's '{key}' has {len(values)} values for {count} rotated pairs: it is inconsistent"
        )
    return tuple(float(value) for value in values)


def read_max_position(hf: HFConfig, rope: RopeConfig | None, default: int) -> int:
    """The longest context: `max_position_embeddings`, or, where the rotary scaling stretches beyond it, as far as that
    reaches. Dynamic and linear scaling stretch the written length, YaRN the trained one."""
    written = hf.size("max_position_embeddings", default)
    scaling = None if rope is None else rope.scaling
    if scaling is None or scaling.kind in ("llama3", "longrope"):
        return written
    if scaling.kind == "yarn":
        return max(written, int(scaling.original_max_position * scaling.factor))
    return int(written * scaling.factor) if scaling.kind == "dynamic" else written
