"""Small checkpoints, made here: Hugging Face models with every parameter re-randomised, and GGUF files of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
OLD_SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
# Architecture in GGUF -> transformers' config class and model class, and the sizes that the config has.
SOURCES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**SIZES, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SIZES),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SIZES),
    "qwen3moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**SIZES, "num_experts": 4}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", SIZES),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SIZES),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SIZES),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", SIZES),
    "granite": ("GraniteConfig", "GraniteForCausalLM", SIZES),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", SIZES),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", SIZES),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4}),
    "gptneox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**OLD_SIZES, "intermediate_size": 96}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": 96, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", SIZES),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", SIZES),
    "mpt": ("MptConfig", "MptForCausalLM", {"vocab_size": 96, "d_model": 64, "n_layers": 3, "n_heads": 4}),
    "falcon": ("FalconConfig", "FalconForCausalLM", OLD_SIZES),
}


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    def make(architecture: str, **options: Any) -> Any:
        """A transformers model. Norms and all others are multiples of 1/256, so that Gemma's 1 + w is exact."""
        import transformers

        config_class, model_class, sizes = SOURCES[architecture]
        config = getattr(transformers, config_class)(**{**sizes, **options})
        model = getattr(transformers, model_class)(config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(-256, 257, parameter.shape, generator=generator) / 256)
        return model

    return make


@pytest.fixture
def hub_tensors(tmp_path: Path) -> Callable[[Any], dict[str, torch.Tensor]]:
    def tensors(model: Any) -> dict[str, torch.Tensor]:
        """The tensors of `model` under the names that a checkpoint on the hub has (modules may be named otherwise)."""
        from safetensors.torch import load_file

        model.save_pretrained(tmp_path / "hub")
        return load_file(tmp_path / "hub" / "model.safetensors")

    return tensors


@pytest.fixture
def write_gguf(tmp_path: Path, hub_tensors: Callable[..., Any]) -> Callable[..., Path]:
    def write(
        model: Any,
        architecture: str,
        *,
        quantization: str = "F32",
        extra: dict[str, Any] | None = None,
        split: int = 0,
        drop: tuple[str, ...] = (),
    ) -> Path:
        """`model` as llama.cpp's converter would store it, values as float32 or quantised by the gguf package.
        `split`: tensors a part. `drop`: keys that this architecture's converter does not write."""
        architecture = {"mixtral": "llama", "olmo3": "olmo2"}.get(architecture, architecture)
        path = tmp_path / f"{architecture}-{quantization}.gguf"
        writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
        for key, value in {**standard_keys(model.config), **(extra or {})}.items():
            if value is not None and key not in drop:
                _add_key(writer, key if key.startswith(architecture) else f"{architecture}.{key}", value)
        for name, values in converted(architecture, model.config, hub_tensors(model)).items():
            kind = gguf.GGMLQuantizationType[quantization]
            if quantization != "F32" and values.ndim > 1:
                writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return sorted(tmp_path.glob(f"{path.stem}*"))[0]

    return write


def _add_key(writer: Any, key: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if whole else gguf.GGUFValueType.get_type(value))


def standard_keys(config: Any) -> dict[str, Any]:
    """What the base class of llama.cpp's converters writes of a config, whatever the config calls it."""

    def get(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) if "head_dim" in config.to_dict() else None
    return {
        "block_count": config.num_hidden_layers,
        "context_length": get("max_position_embeddings", "seq_length", "max_seq_len"),
        "embedding_length": config.hidden_size,
        "feed_forward_length": get("intermediate_size", "n_inner") or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": get("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": get("rms_norm_eps"),
        "attention.layer_norm_epsilon": get("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": rope.get("rope_theta"),
        "expert_count": get("num_local_experts", "num_experts"),
        "expert_used_count": get("num_experts_per_tok"),
        "vocab_size": config.vocab_size,
    }


def converted(architecture: str, config: Any, state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """`state` by llama.cpp's names (the gguf package's own table), with what its converter does to the values."""
    table = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in stacked(state).items():
        key = name.removeprefix("transformer.") if architecture == "bloom" else name
        target = table.get_name(key, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        tensors[target] = rearranged(architecture, config, name, tensor.numpy())
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = np.array(llama3_divisors(rope, config), dtype=np.float32)
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            tensors[f"rope_factors_{length}.weight"] = np.array(rope[f"{length}_factor"], dtype=np.float32)
    return tensors


def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts, and StableLM's norms of each head, become one tensor."""
    merged: dict[str, list[torch.Tensor]] = {}
    plain = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.+)\.(?:experts|norms)\.(\d+)(\..+)?\.weight", name)
        if match is None:
            plain[name] = tensor
            continue
        stem = match[1].replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        key = f"{stem}.experts{match[3]}.weight" if match[3] else f"{match[1]}.weight"
        key = key.replace("layers.", "model.layers.", 1) if ".mlp." in key else key
        merged.setdefault(key, [torch.empty(0)] * sum(other.startswith(f"{match[1]}.") for other in state))
        merged[key][int(match[2])] = tensor
    return plain | {key: torch.stack([t for t in parts if t.numel()]) for key, parts in merged.items()}


def rearranged(architecture: str, config: Any, name: str, values: np.ndarray) -> np.ndarray:
    heads, hidden = config.num_attention_heads, config.hidden_size
    part = name.split(".")[-2]
    if architecture in ("llama", "smollm3", "granite") and part in ("q_proj", "k_proj"):
        count = heads if part == "q_proj" else config.num_key_value_heads
        halves = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    if architecture == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
        return values.T
    if architecture in ("gptneox", "bloom") and "query_key_value" in name:
        triples = values.reshape(heads, 3, hidden // heads, *values.shape[1:])
        return np.concatenate([triples[:, i].reshape(-1, *values.shape[1:]) for i in range(3)])
    if architecture == "falcon" and "query_key_value" in name:
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
        qkv = values.reshape(groups, heads // groups + 2, hidden // heads, hidden)
        return np.concatenate([part.reshape(-1, hidden) for part in (qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]])])
    return values


def llama3_divisors(rope: dict[str, Any], config: Any) -> list[float]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return divisors
