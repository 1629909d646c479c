"""Well-known models by name, as the facts of their config.json that decide speed: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paceline.errors import CheckpointError, UsageError
from paceline.registry import lookup

Config = Mapping[str, Any]
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _decoder(
    architecture: str,
    hidden_size: int,
    layers: int,
    heads: tuple[int, int],
    intermediate_size: int,
    vocab_size: int,
    max_position: int,
    rope_theta: float,
    **other: Any,
) -> Config:
    """`heads`: of queries, and of keys and values. The activation is SiLU, gated, the norm RMS."""
    return MappingProxyType(
        {
            "architectures": [f"{architecture}ForCausalLM"],
            "model_type": architecture.lower(),
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "intermediate_size": intermediate_size,
            "vocab_size": vocab_size,
            "max_position_embeddings": max_position,
            "rope_theta": rope_theta,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **other,
        }
    )


SHAPES: Mapping[str, Config] = MappingProxyType(
    {
        "smollm2-135m": _decoder("Llama", 576, 30, (9, 3), 1536, 49152, 8192, 1e5, tie_word_embeddings=True),
        "llama-3.2-1b": _decoder(
            *("Llama", 2048, 16, (32, 8), 8192, 128256, 131072, 5e5),
            tie_word_embeddings=True,
            rope_scaling={**_LLAMA_3_ROPE, "factor": 32.0},
        ),
        "llama-3.1-8b": _decoder(
            *("Llama", 4096, 32, (32, 8), 14336, 128256, 131072, 5e5), rope_scaling={**_LLAMA_3_ROPE, "factor": 8.0}
        ),
        "llama-3.1-70b": _decoder(
            *("Llama", 8192, 80, (64, 8), 28672, 128256, 131072, 5e5), rope_scaling={**_LLAMA_3_ROPE, "factor": 8.0}
        ),
        "llama-2-7b": _decoder("Llama", 4096, 32, (32, 32), 11008, 32000, 4096, 1e4, torch_dtype="float16"),
        "mistral-7b-v0.3": _decoder(
            "Mistral", 4096, 32, (32, 8), 14336, 32768, 32768, 1e6, sliding_window=None, head_dim=128
        ),
        "mixtral-8x7b": _decoder(
            *("Mixtral", 4096, 32, (32, 8), 14336, 32000, 32768, 1e6),
            sliding_window=None,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        "qwen2.5-0.5b": _decoder(
            "Qwen2", 896, 24, (14, 2), 4864, 151936, 32768, 1e6, rms_norm_eps=1e-6, tie_word_embeddings=True
        ),
        "qwen3-8b": _decoder("Qwen3", 4096, 36, (32, 8), 12288, 151936, 40960, 1e6, rms_norm_eps=1e-6, head_dim=128),
    }
)


def read_shape(name: str) -> dict[str, Any]:
    """The config of a name in SHAPES, of a config.json, or of a directory that holds one.

    Raises UsageError for a name that is none of them, naming the nearest; CheckpointError for a file that is no JSON
    object.
    """
    path = Path(name).expanduser()
    if name not in SHAPES and (path.suffix == ".json" or path.is_dir()):
        return _read(path / "config.json" if path.is_dir() else path)
    return dict(lookup(SHAPES, "shape", name))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a config.json, a directory that holds one, or a shape's name")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object: it is no config.json")
    return config
