"""A Hugging Face config.json and generation_config.json, rebuilt from GGUF metadata.

GGUF says less than config.json: what a family fixes (activation, embedding scale, layer pattern) is a table here, and
Llama 3's rotary scaling is recovered from its divisors. Metadata numbers are float32; they become the shortest decimal
that is the same float32, which is what config.json held (9.999999747e-06 is 1e-05 again).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.gguf_names import ARCHITECTURES

# What the architecture's name alone says. "period": every n-th layer sees the whole context, the others a window.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"},
    "gemma2": {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
    "gemma3": {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]},
}
GEMMA_PERIOD = {"gemma2": 2, "gemma3": 6}
# The 27B models scale queries by (hidden / heads)**-0.5, all others by head_dim**-0.5; only their depth tells them.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
GEMMA3_LOCAL_THETA = 10000.0

# Llama 3.1's rule (its head_dim-independent constants); the files store only the divisors that follow from it.
LLAMA3_RULE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Tokens that end a turn in every model that has them; converters record at most one of them as eos.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")


class Metadata:
    """GGUF metadata of one architecture; a missing or mistyped key is a CheckpointError naming it."""

    def __init__(self, path: object, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.values = metadata
        self.architecture = self._get("general.architecture", str, None)
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{path}: GGUF architecture '{self.architecture}' is not supported (known: {', '.join(ARCHITECTURES)})"
            )

    def _get(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = "is missing" if key not in self.values else f"is {str(value)[:40]!r}"
            raise CheckpointError(f"{self.path}: metadata key '{key}' {found}, expected one {kind.__name__}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value: int = self._get(f"{self.architecture}.{key}", int, default)
        if value < 1:
            raise CheckpointError(
                f"{self.path}: metadata key '{self.architecture}.{key}' is {value}, expected at least 1"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return shortest_float32(self._get(f"{self.architecture}.{key}", float, default))

    def text(self, key: str, default: str) -> str:
        value: str = self._get(f"{self.architecture}.{key}", str, default)
        return value

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.values


def shortest_float32(value: float) -> float:
    """The decimal with the fewest digits that rounds to the same float32."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def hf_config(
    metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], rope_factors: Sequence[float] | None
) -> dict[str, Any]:
    """config.json of the model. `shapes`: of the tensors, by Hugging Face name. `rope_factors`: Llama 3's divisors."""
    hidden = metadata.integer("embedding_length")
    heads = metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", max(hidden // heads, 1))
    rope_dim = metadata.integer("rope.dimension_count", head_dim)
    if rope_dim != head_dim or metadata.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{metadata.path}: head size {head_dim}, values of {metadata.integer('attention.value_length', head_dim)} "
            f"and rotary size {rope_dim} differ, which is not supported"
        )
    theta = metadata.number("rope.freq_base", 10000.0)
    scaling = rope_scaling(metadata)
    if rope_factors is not None:
        scaling = llama3_scaling(metadata.path, rope_factors, theta, head_dim)
    config = {
        **FAMILIES[metadata.architecture],
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "hidden_size": hidden,
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }
    if metadata.architecture == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in shapes
    if metadata.architecture in GEMMA_PERIOD:
        config.update(_gemma(metadata, config))
    return config


def _gemma(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    architecture, layers = metadata.architecture, config["num_hidden_layers"]
    query_scalar = config["head_dim"]
    if layers == GEMMA_27B_LAYERS[architecture]:
        query_scalar = config["hidden_size"] // config["num_attention_heads"]
    period = GEMMA_PERIOD[architecture]
    extra = {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": metadata.integer("attention.sliding_window"),
        "query_pre_attn_scalar": query_scalar,
        "layer_types": [
            "full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)
        ],
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        extra[key] = metadata.number(key) if metadata.has(key) else None
    if architecture == "gemma3":
        extra["rope_local_base_freq"] = metadata.number("rope.freq_base_swa", GEMMA3_LOCAL_THETA)
    return extra


def rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    """`rope_scaling` of config.json from the rope.scaling.* keys; kinds we cannot run are refused by the family."""
    kind = metadata.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": metadata.number("rope.scaling.factor", 1.0)}
    if metadata.has("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = metadata.integer("rope.scaling.original_context_length")
    return scaling


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


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids of generation_config.json; `eos_token_id` lists every token that ends a reply, lowest first.

    Those recorded as eos, eot or eom, and those of TURN_ENDS in the vocabulary: Qwen's and Gemma's converters record
    only one of the two that the original generation_config.json lists.
    """
    ids = {metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids.update(tokens.index(token) for token in TURN_ENDS if token in tokens)
    config: dict[str, Any] = {"eos_token_id": sorted(token for token in ids if isinstance(token, int))}
    for ours, theirs in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(token, int):
            config[ours] = token
    return config if config["eos_token_id"] else {key: value for key, value in config.items() if key != "eos_token_id"}
