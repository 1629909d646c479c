"""Tiny models with random weights, one of each architecture, and what to call them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

VOCAB = 100
LAYERS, HEADS, WIDTH, INNER = 2, 4, 32, 64
IMAGE, PATCH = 24, 8
MELS, FRAMES = 8, 40

USUAL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
ENCODER_DECODER = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    **SPECIAL,
}
VISION = {"image_size": IMAGE, "patch_size": PATCH}

# Class, configuration, what it is called with ("text", "pair" of texts, "image", "sound" and text, "both" image and
# text), and the implementations of attention that transformers has for it.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], str, tuple[str, ...]]] = {
    "bert": ("BertModel", "BertConfig", USUAL, "text", ("sdpa", "eager")),
    "roberta": ("RobertaModel", "RobertaConfig", {**USUAL, "pad_token_id": 0}, "text", ("sdpa", "eager")),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER, "vocab_size": VOCAB},
        "text",
        ("sdpa", "eager"),
    ),
    "albert": ("AlbertModel", "AlbertConfig", {**USUAL, "embedding_size": 16}, "text", ("sdpa", "eager")),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {
            **USUAL,
            **SPECIAL,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
        },
        "text",
        ("sdpa", "eager"),
    ),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "text",
        ("eager",),
    ),
    "t5": (
        "T5Model",
        "T5Config",
        {"d_model": WIDTH, "d_kv": 8, "num_heads": HEADS, "d_ff": INNER, "num_layers": LAYERS, "vocab_size": VOCAB},
        "pair",
        ("eager",),
    ),
    "bart": ("BartModel", "BartConfig", ENCODER_DECODER, "pair", ("sdpa", "eager")),
    "marian": ("MarianModel", "MarianConfig", ENCODER_DECODER, "pair", ("sdpa", "eager")),
    "whisper": (
        "WhisperModel",
        "WhisperConfig",
        {**ENCODER_DECODER, "num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "max_target_positions": 64},
        "sound",
        ("sdpa", "eager"),
    ),
    "vit": ("ViTModel", "ViTConfig", {**USUAL, **VISION}, "image", ("sdpa", "eager")),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**USUAL, **SPECIAL, "projection_dim": WIDTH},
            "vision_config": {**USUAL, **VISION, "projection_dim": WIDTH},
            "projection_dim": WIDTH,
        },
        "both",
        ("sdpa", "eager"),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCAB, **SPECIAL},
        "text",
        ("sdpa", "eager"),
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**USUAL, **SPECIAL, "num_key_value_heads": 2},
        "text",
        ("sdpa", "eager"),
    ),
}


@pytest.fixture(autouse=True)
def no_captures_left() -> Iterator[None]:
    """What Dynamo captured for one test is gone before the next."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    """tiny_model(name, attention="sdpa", dtype=float32): one of ARCHITECTURES, with the same weights each time."""

    def make(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
        import transformers

        model_class, config_class, settings, _, _ = ARCHITECTURES[name]
        config = getattr(transformers, config_class)(**settings)
        config._attn_implementation = attention
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():  # as they come many are 0 or 1, which hides errors
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.to(dtype).eval()

    return make
