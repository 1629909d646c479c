"""Small checkpoints, made here: Hugging Face models with every parameter re-randomised, and GGUF files of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from paceline.loading.gguf_config import llama3_factors
from paceline.loading.gguf_names import to_gguf

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SOURCES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "gemma3": "Gemma3Text"}
CAUSAL = {"gemma3": "Gemma3ForCausalLM"}


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    def make(architecture: str, **options: Any) -> Any:
        """A transformers model. Norms and all others are multiples of 1/256, so that Gemma's 1 + w is exact."""
        import transformers

        config = getattr(transformers, f"{SOURCES[architecture]}Config")(**{**SIZES, **options})
        name = CAUSAL.get(architecture, f"{SOURCES[architecture]}ForCausalLM")
        model = getattr(transformers, name)(config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(-256, 257, parameter.shape, generator=generator) / 256)
        return model

    return make


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    def write(model: Any, architecture: str, *, quantization: str = "F32", extra: dict[str, Any] | None = None) -> Path:
        """`model` as llama.cpp's converter would store it, values as float32 or quantised by the gguf package."""
        config = model.config
        path = tmp_path / f"{architecture}-{quantization}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        for key, value in (extra or {}).items():
            kind = gguf.GGUFValueType.UINT32 if isinstance(value, int) else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
        state = model.state_dict()
        tied = config.tie_word_embeddings
        for name, tensor in state.items():
            if not (tied and name == "lm_head.weight"):
                _add(writer, config, architecture, name, tensor.numpy(), quantization)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "llama3":
            head_dim = config.hidden_size // config.num_attention_heads
            factors = llama3_factors(rope["factor"], rope["rope_theta"], head_dim)
            writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _add(writer: Any, config: Any, architecture: str, name: str, values: np.ndarray, quantization: str) -> None:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture == "llama" and heads:
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        values = values + 1
    target = to_gguf(architecture, name)
    assert target is not None, name
    kind = gguf.GGMLQuantizationType[quantization]
    if quantization != "F32" and values.ndim > 1:
        writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    else:
        writer.add_tensor(target, np.ascontiguousarray(values, dtype=np.float32))
