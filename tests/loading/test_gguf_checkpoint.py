"""Hugging Face models, written as GGUF the way llama.cpp's converter does, must come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.checkpoint import open_checkpoint
from paceline.loading.gguf_config import generation_config, llama3_factors, llama3_scaling, shortest_float32
from paceline.loading.gguf_names import ARCHITECTURES, GLOBAL_NAMES, layer_names, to_gguf, to_hf
from paceline.loading.resolve import ModelSource, resolve

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16}
GEMMA2_KEYS = {
    "gemma2.attention.key_length": 24,
    "gemma2.attention.value_length": 24,
    "gemma2.attention.sliding_window": 16,
    "gemma2.attn_logit_softcapping": 50.0,
    "gemma2.final_logit_softcapping": 30.0,
}
GEMMA3_KEYS = {
    "gemma3.attention.key_length": 24,
    "gemma3.attention.value_length": 24,
    "gemma3.attention.sliding_window": 16,
    "gemma3.rope.freq_base": 1e6,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
# Case -> architecture, options of the transformers config, what a converter writes besides the sizes.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}, {}),
    "llama tied, biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"llama.rope.dimension_count": 16},
    ),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}, {"llama.rope.freq_base": 500000.0}),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-6}, {"qwen2.rope.freq_base": 10000.0}),
    "qwen3": ("qwen3", {"head_dim": 24}, {"qwen3.attention.key_length": 24, "qwen3.attention.value_length": 24}),
    "gemma2": ("gemma2", GEMMA, GEMMA2_KEYS),
    "gemma3": ("gemma3", {**GEMMA, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE}, GEMMA3_KEYS),
}


def source_of(path: Path) -> ModelSource:
    return resolve(str(path))


@pytest.mark.parametrize("case", sorted(CASES))
def test_tensors_and_config_come_back(
    case: str, tiny_model: Callable[..., Any], write_gguf: Callable[..., Path]
) -> None:
    architecture, options, extra = CASES[case]
    model = tiny_model(architecture, **options)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    with open_checkpoint(source_of(write_gguf(model, architecture, extra=extra))) as checkpoint:
        assert set(checkpoint.names()) == set(state)
        for name, tensor in state.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            values = checkpoint.read(name)
            assert values.dtype == checkpoint.dtype(name) == torch.float32
            assert torch.equal(values, tensor), name
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in state.values())
        read = type(model.config)(**checkpoint.config).to_dict()
    original = model.config.to_dict()
    # What no weight depends on: ids of tokens (generation_config), and how the config was made.
    ignored = {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "architectures", "_name_or_path"}
    assert {key: read.get(key) for key in original if key not in ignored} == {
        key: value for key, value in original.items() if key not in ignored
    }


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_quantised_rows_are_unpermuted_like_dense_ones(
    quantization: str, tiny_model: Callable[..., Any], write_gguf: Callable[..., Path]
) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    kind = gguf.GGMLQuantizationType[quantization]
    with open_checkpoint(source_of(write_gguf(model, "llama", quantization=quantization))) as checkpoint:
        for name, tensor in model.state_dict().items():
            if tensor.ndim > 1 and name != "lm_head.weight":
                expected = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
                np.testing.assert_array_equal(checkpoint.read(name).float().numpy(), expected)
        dense = {"F16": torch.float16, "BF16": torch.bfloat16}
        name = "model.layers.0.self_attn.q_proj.weight"
        assert checkpoint.read(name).dtype == checkpoint.dtype(name) == dense.get(quantization, torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_two_way(architecture: str) -> None:
    names = [f"{stem}.weight" for stem in GLOBAL_NAMES]
    names += [f"blk.11.{stem}.{suffix}" for stem in layer_names(architecture) for suffix in ("weight", "bias")]
    translated = [to_hf(architecture, name) for name in names]
    assert len(set(translated)) == len(names)
    assert [to_gguf(architecture, name or "") for name in translated] == names
    assert to_hf(architecture, "blk.0.ffn_gate_exps.weight") is None
    assert to_hf(architecture, "token_embd") is None
    assert to_gguf(architecture, "model.layers.0.mlp.experts.weight") is None


def test_missing_tensor_and_use_after_close_are_named(
    tiny_model: Callable[..., Any], write_gguf: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(source_of(write_gguf(tiny_model("qwen2"), "qwen2")))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.9\.x' is missing"):
        checkpoint.read("model.layers.9.x")
    kept = checkpoint.read("model.norm.weight")
    checkpoint.close()
    assert torch.isfinite(kept).all()
    with pytest.raises(CheckpointError, match="after close"):
        checkpoint.read("model.norm.weight")


def write_raw(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, str]]) -> ModelSource:
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source_of(path)


EMBEDDING = {"token_embd.weight": (np.zeros((4, 8), np.float32), "F32")}


def test_what_we_cannot_run_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(UnsupportedModelError, match="architecture 'mamba' is not supported"):
        open_checkpoint(write_raw(path, {"architecture": "mamba"}, EMBEDDING))
    ternary = {"blk.0.attn_v.weight": (np.zeros((2, 54), np.uint8), "TQ1_0")}
    with pytest.raises(UnsupportedModelError, match=r"'blk\.0\.attn_v\.weight' is stored as TQ1_0.* use a file.* Q4_K"):
        open_checkpoint(write_raw(path, {}, {**EMBEDDING, **ternary}))
    experts = {"blk.0.ffn_gate_exps.weight": (np.zeros((2, 4, 8), np.float32), "F32")}
    with pytest.raises(UnsupportedModelError, match=r"ffn_gate_exps\.weight' has no place"):
        open_checkpoint(write_raw(path, {}, {**EMBEDDING, **experts}))
    with pytest.raises(CheckpointError, match=r"'llama\.embedding_length' is missing"):
        open_checkpoint(write_raw(path, {}, EMBEDDING))
    with pytest.raises(CheckpointError, match=r"'token_embd\.weight' is missing"):
        open_checkpoint(write_raw(path, {}, {"output_norm.weight": (np.zeros(8, np.float32), "F32")}))
    with pytest.raises(UnsupportedModelError, match="part 1 of 3"):
        open_checkpoint(write_raw(path, {"split.count": 3}, EMBEDDING))


def test_llama3_factors_of_another_rule_are_refused() -> None:
    factors = llama3_factors(32.0, 500000.0, 64)
    assert llama3_scaling("f", factors, 500000.0, 64)["factor"] == 32.0
    factors[15] *= 1.01
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        llama3_scaling("f", factors, 500000.0, 64)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        llama3_scaling("f", factors[:-1], 500000.0, 64)


def test_llama3_factors_are_transformers_own() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / scaled, llama3_factors(8.0, 500000.0, 64), rtol=1e-5)


def test_every_end_of_turn_is_an_end() -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["a", "<end_of_turn>", "b", "<eos>"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
    }
    assert generation_config(metadata) == {"eos_token_id": [1, 3], "bos_token_id": 0, "pad_token_id": 2}
    assert generation_config({"tokenizer.ggml.eot_token_id": 7}) == {"eos_token_id": [7]}
    assert generation_config({}) == {}


def test_float32_metadata_becomes_the_decimal_it_was() -> None:
    for value in (1e-5, 1e-6, 0.1, 1234.5, 500000.0, 1e6, 3.1415927):
        assert shortest_float32(float(np.float32(value))) == value


@pytest.mark.default_model
def test_default_model(default_model_gguf: Path) -> None:
    with open_checkpoint(source_of(default_model_gguf)) as checkpoint:
        assert len(checkpoint.names()) == 272
        assert checkpoint.config["rms_norm_eps"] == 1e-5
        assert checkpoint.config["tie_word_embeddings"] is True
        assert checkpoint.generation_config["eos_token_id"] == [2]


@pytest.mark.slow
@pytest.mark.default_model
def test_default_model_equals_transformers_bitwise(default_model_gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        default_model_gguf.parent, gguf_file=default_model_gguf.name, dtype=torch.float32
    )
    state = model.state_dict()
    with open_checkpoint(source_of(default_model_gguf)) as checkpoint:
        assert set(state) - set(checkpoint.names()) == {"lm_head.weight"}
        for name in checkpoint.names():
            assert torch.equal(checkpoint.read(name), state[name]), name
