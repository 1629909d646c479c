"""Hugging Face models, written as GGUF the way llama.cpp's converter does, must come back as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.checkpoint import open_checkpoint
from paceline.loading.gguf_config import generation_config
from paceline.loading.gguf_metadata import shortest_float32
from paceline.loading.gguf_rope import llama3_factors, llama3_scaling
from paceline.loading.resolve import ModelSource, resolve
from paceline.models.registry import read_decoder_config

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
    "attention.key_length": 24,
    "attention.value_length": 24,
    "attention.sliding_window": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3_KEYS = {
    "attention.key_length": 24,
    "attention.value_length": 24,
    "attention.sliding_window": 16,
    "rope.freq_base": 1e6,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 8.0,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 16.0,
    "attention_factor": 1.25,
}
OLMO3_ROPE = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.5, 8.0, 16.25, 32.0],
}
HEAD_DIM = {"attention.key_length": 24, "attention.value_length": 24}
NO_KV = ("attention.head_count_kv",)
# Case -> architecture, options of the transformers config, what its converter writes otherwise than the base class.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}, {}),
    "llama tied, biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"rope.dimension_count": 16},
    ),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}, {}),
    "mixtral": ("mixtral", {"num_experts_per_tok": 3}, {"rope.dimension_count": 16}),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-6}, {}),
    "qwen2 yarn": (
        "qwen2",
        {"rope_parameters": YARN},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_attn_factor": 1.25,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24}, {}),
    "qwen3moe": (
        "qwen3moe",
        {"head_dim": 24, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True},
        {"expert_feed_forward_length": 32},
    ),
    "gemma2": ("gemma2", GEMMA, GEMMA2_KEYS),
    "gemma3": ("gemma3", {**GEMMA, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE}, GEMMA3_KEYS),
    "phi3": (
        "phi3",
        {"sliding_window": 40, "original_max_position_embeddings": 128},
        {"rope.dimension_count": 16, "attention.sliding_window": 40, "rope.scaling.original_context_length": 128},
    ),
    "phi3 longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32, "max_position_embeddings": 1024},
        {
            "rope.dimension_count": 12,
            "attention.sliding_window": 0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": math.sqrt(2),
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}, {"rope.dimension_count": 16}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.0625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "attention_bias": True,
        },
        {"attention.scale": 0.0625, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0},
    ),
    "olmo2": ("olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, {}),
    "stablelm": (
        "stablelm",
        {"use_qkv_bias": True},
        {"rope.dimension_count": 4, "use_parallel_residual": False, "rope.freq_base": None},
    ),
    "stablelm 12b": (
        "stablelm",
        {"use_parallel_residual": True, "qk_layernorm": True},
        {"rope.dimension_count": 4, "use_parallel_residual": True, "rope.freq_base": None},
    ),
    "olmo3": (
        "olmo3",
        {"sliding_window": 40, "num_hidden_layers": 5, "rope_parameters": OLMO3_ROPE},
        {
            "attention.sliding_window": 40,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": 1.25,
        },
    ),
    "starcoder2": ("starcoder2", {"sliding_window": 4096}, {}),
    "mpt": ("mpt", {}, {"attention.max_alibi_bias": 8.0}),
    "mpt clipped": (
        "mpt",
        {"attn_config": {"clip_qkv": 6.0}},
        {"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 6.0},
    ),
    "gpt2": ("gpt2", {"n_inner": 256}, {}),
    "gptneox": (
        "gptneox",
        {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.25},
        },
        {"rope.dimension_count": 4, "use_parallel_residual": False},
    ),
    "bloom": ("bloom", {"seq_length": 96}, {"attention.head_count_kv": 4}),
    "falcon 7b": ("falcon", {"num_kv_heads": 1}, {"attention.head_count_kv": 1, "tensor_data_layout": "jploski"}),
    "falcon 40b": (
        "falcon",
        {"num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
        {"attention.head_count_kv": 2, "tensor_data_layout": "jploski"},
    ),
    "falcon 11b": (
        "falcon",
        {"num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        {"attention.head_count_kv": 2, "tensor_data_layout": "jploski"},
    ),
}
# What no weight depends on: ids of tokens (generation_config), and how the config was made.
UNSTORED = {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "architectures", "_name_or_path"}


def source_of(path: Path) -> ModelSource:
    return resolve(str(path))


@pytest.mark.parametrize("case", sorted(CASES))
def test_tensors_and_config_come_back(
    case: str,
    tiny_model: Callable[..., Any],
    write_gguf: Callable[..., Path],
    hub_tensors: Callable[..., dict[str, torch.Tensor]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    architecture, options, extra = CASES[case]
    model = tiny_model(architecture, **options)
    state = hub_tensors(model)
    with open_checkpoint(source_of(write_gguf(model, architecture, extra=extra))) as checkpoint:
        assert set(checkpoint.names()) == set(state)
        for name, tensor in state.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            values = checkpoint.read(name)
            assert values.dtype == checkpoint.dtype(name) == torch.float32
            assert torch.equal(values, tensor), name
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in state.values())
        assert checkpoint.config["architectures"] == model.config.architectures
        read = type(model.config)(**checkpoint.config).to_dict()
    assert "ignores" not in caplog.text
    original = model.config.to_dict()
    assert {key: read.get(key) for key in original if key not in UNSTORED} == {
        key: value for key, value in original.items() if key not in UNSTORED
    }


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"stablelm 12b", "mpt clipped"}))  # which no family reads
def test_the_family_reads_the_config_as_it_reads_the_published_one(
    case: str, tiny_model: Callable[..., Any], write_gguf: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    architecture, options, extra = CASES[case]
    model = tiny_model(architecture, **options)
    with open_checkpoint(source_of(write_gguf(model, architecture, extra=extra))) as checkpoint:
        found = read_decoder_config(checkpoint.config)
    assert "does not know" not in caplog.text
    published = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    assert found == read_decoder_config(published)


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
    with pytest.raises(CheckpointError, match=r"'llama\.attention\.head_count' is missing"):
        open_checkpoint(write_raw(path, {}, EMBEDDING))
    with pytest.raises(CheckpointError, match=r"'token_embd\.weight' is missing"):
        open_checkpoint(write_raw(path, {}, {"output_norm.weight": (np.zeros(8, np.float32), "F32")}))


@pytest.mark.parametrize(
    ("case", "extra", "message"),
    [
        (
            "llama",
            {"attention.sliding_window": 64},
            r"'llama\.attention\.sliding_window' is '64', which paceline does not",
        ),
        ("phi3", {"attention.clamp_kqv": 4.0}, r"'phi3\.attention\.clamp_kqv' is '4\.0'"),
        ("mpt", {"attention.head_count_kv": 2}, "an MPT with 2 key-value heads for 4"),
        ("llama", {"expert_count": 4}, r"'llama\.expert_count' is '4'"),
        ("qwen2", {"attention.causal": False}, r"'qwen2\.attention\.causal' is 'False'"),
        ("llama", {"rope.scaling.type": "longrope"}, r"rope\.scaling\.type' is 'longrope'"),
        ("qwen2 yarn", {"rope.scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier' is '0\.1"),
        ("llama", {"rope.dimension_count": 8}, "head size 16, values of 16 and rotary size 8 differ"),
        ("falcon 11b", {"attention.head_count_kv": 4}, "as many key-value heads as heads"),
    ],
)
def test_what_would_change_the_result_is_refused(
    case: str, extra: dict[str, Any], message: str, tiny_model: Callable[..., Any], write_gguf: Callable[..., Path]
) -> None:
    architecture, options, keys = CASES[case]
    path = write_gguf(tiny_model(architecture, **options), architecture, extra={**keys, **extra})
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(source_of(path))


def test_unknown_keys_are_logged(
    tiny_model: Callable[..., Any], write_gguf: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    open_checkpoint(source_of(write_gguf(tiny_model("llama"), "llama", extra={"attention.novelty": 2})))
    assert "does not know and ignores: 'llama.attention.novelty'" in caplog.text


def test_another_attention_factor_is_kept(tiny_model: Callable[..., Any], write_gguf: Callable[..., Path]) -> None:
    _, options, keys = CASES["phi3 longrope"]
    path = write_gguf(tiny_model("phi3", **options), "phi3", extra={**keys, "rope.scaling.attn_factor": 1.5})
    assert open_checkpoint(source_of(path)).config["rope_scaling"]["attention_factor"] == 1.5


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
