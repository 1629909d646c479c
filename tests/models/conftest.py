"""A checkpoint in memory, and the smallest config.json of each architecture."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch


class MemoryCheckpoint:
    """Named tensors, as load_decoder takes them. `reads` lists what was read, in order."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.reads: list[str] = []

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self.tensors[name]

    def span(self, name: str) -> None:
        return None


@pytest.fixture
def llama_config() -> dict[str, Any]:
    """A config.json as transformers 4 wrote it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "vocab_size": 64,
    }


@pytest.fixture
def llama_checkpoint() -> Callable[..., MemoryCheckpoint]:
    """The tensors that `llama_config` describes, under Hugging Face's names; `hidden`: another size."""

    def make(hidden: int = 32) -> MemoryCheckpoint:
        generator = torch.Generator().manual_seed(3)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, hidden), "lm_head.weight": (64, hidden)}
        shapes["model.norm.weight"] = (hidden,)
        for i in range(2):
            layer = f"model.layers.{i}"
            shapes |= {f"{layer}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
            rows = {"q": hidden, "k": hidden // 2, "v": hidden // 2, "o": hidden}
            shapes |= {f"{layer}.self_attn.{p}_proj.weight": (n, hidden) for p, n in rows.items()}
            shapes |= {f"{layer}.mlp.{p}_proj.weight": (48, hidden) for p in ("gate", "up")}
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, 48)
        return MemoryCheckpoint({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})

    return make
