"""Tiny models with random weights, one of each architecture, and what to call them with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
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

# Class, configuration, and what it is called with: "text", "pair" of texts, "image", "sound" and text, "both" image and
# text.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertModel", "BertConfig", USUAL, "text"),
    "roberta": ("RobertaModel", "RobertaConfig", {**USUAL, "pad_token_id": 0}, "text"),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER, "vocab_size": VOCAB},
        "text",
    ),
    "albert": ("AlbertModel", "AlbertConfig", {**USUAL, "embedding_size": 16}, "text"),
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
    ),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "text",
    ),
    "t5": (
        "T5Model",
        "T5Config",
        {"d_model": WIDTH, "d_kv": 8, "num_heads": HEADS, "d_ff": INNER, "num_layers": LAYERS, "vocab_size": VOCAB},
        "pair",
    ),
    "bart": ("BartModel", "BartConfig", ENCODER_DECODER, "pair"),
    "marian": ("MarianModel", "MarianConfig", ENCODER_DECODER, "pair"),
    "whisper": (
        "WhisperModel",
        "WhisperConfig",
        {**ENCODER_DECODER, "num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "max_target_positions": 64},
        "sound",
    ),
    "vit": ("ViTModel", "ViTConfig", {**USUAL, **VISION}, "image"),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**USUAL, **SPECIAL, "projection_dim": WIDTH},
            "vision_config": {**USUAL, **VISION, "projection_dim": WIDTH},
            "projection_dim": WIDTH,
        },
        "both",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCAB, **SPECIAL},
        "text",
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**USUAL, **SPECIAL, "num_key_value_heads": 2},
        "text",
    ),
    "qwen3": (
        "Qwen3Model",
        "Qwen3Config",
        {**USUAL, **SPECIAL, "num_key_value_heads": 2, "head_dim": 8},
        "text",
    ),
    "phi": (
        "PhiModel",
        "PhiConfig",
        {**USUAL, **SPECIAL, "partial_rotary_factor": 0.5},
        "text",
    ),
    "gpt-neox": (
        "GPTNeoXModel",
        "GPTNeoXConfig",
        {**USUAL, **SPECIAL, "rotary_pct": 0.5},
        "text",
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

        model_class, config_class, settings, _ = ARCHITECTURES[name]
        config = getattr(transformers, config_class)(**settings)
        config._attn_implementation = attention
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():  # as they come many are 0 or 1, which hides errors
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def tiny_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """tiny_inputs(name, batch, length, padded="right", dtype=float32): what that model is called with. Two places of
    the last row are padding, at its left or right, where the length allows it."""

    def make(
        name: str, batch: int, length: int, padded: str = "right", dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * batch + length)
        ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        if length > 3:
            mask[-1:, slice(-2, None) if padded == "right" else slice(0, 2)] = 0
        ids = ids * mask
        text = {"input_ids": ids, "attention_mask": mask}
        image = {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=generator).to(dtype)}
        kind = ARCHITECTURES[name][3]
        if kind == "pair":
            return {**text, "decoder_input_ids": ids.flip(1)[:, : max(length // 2, 1)].clone()}
        if kind == "sound":
            sound = torch.randn(batch, MELS, FRAMES, generator=generator).to(dtype)
            return {"input_features": sound, "decoder_input_ids": ids}
        return {"text": text, "image": image, "both": {**text, **image}}[kind]

    return make


@pytest.fixture
def tensors_of() -> Callable[[Any], list[torch.Tensor]]:
    """All tensors of a model's result, in order: in containers, ModelOutputs and caches of keys and values."""

    def find(result: Any) -> list[torch.Tensor]:
        if isinstance(result, torch.Tensor):
            return [result]
        if isinstance(result, Mapping):
            return [tensor for value in result.values() for tensor in find(value)]
        if isinstance(result, (list, tuple)):
            return [tensor for value in result for tensor in find(value)]
        if hasattr(result, "cross_attention_cache"):
            return [*find(result.self_attention_cache), *find(result.cross_attention_cache)]
        return [tensor for layer in getattr(result, "layers", ()) for tensor in find([layer.keys, layer.values])]

    return find


@pytest.fixture
def assert_as_exact(tensors_of: Callable[[Any], list[torch.Tensor]]) -> Callable[[Any, Any, Any], None]:
    """assert_as_exact(found, own, exact): every tensor's error against float64 is at most twice that of the model's own
    forward; a rounding of the largest numbers is allowed where that has none."""

    def check(found: Any, own: Any, exact: Any) -> None:
        lists = [tensors_of(result) for result in (found, own, exact)]
        assert len({len(tensors) for tensors in lists}) == 1
        assert lists[0]
        for ours, theirs, wanted in zip(*lists, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert torch.equal(ours.isfinite(), theirs.isfinite())
            if not ours.numel():
                continue
            if not ours.is_floating_point():
                assert torch.equal(ours, theirs)
                continue
            # transformers' softmax is in float32, where float64's lowest number, the mask of a row with nothing to see,
            # is -inf, and the row NaN: there is nothing to compare with.
            known = wanted.isfinite()
            if not known.any():  # such a row is a key of all others: what is left is the model's own
                bound = 16 * torch.finfo(ours.dtype).eps * theirs.double().abs().max().item()
                torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
                continue
            error, allowed = ((one.double() - wanted)[known].square().mean().sqrt() for one in (ours, theirs))
            assert error <= 2 * allowed + torch.finfo(ours.dtype).eps / 2 * wanted[known].abs().max()

    return check


@pytest.fixture
def rewritten() -> Callable[..., Any]:
    """rewritten(function, *calls, **weights): the report of the one graph of `function(*call, **weights)`. Results were
    compared on every call: those after the first run what the passes made of it."""
    from paceline.fusion import optimize, report

    class Holder(nn.Module):
        def __init__(self, function: Callable[..., Any], weights: dict[str, torch.Tensor]) -> None:
            super().__init__()
            self.function = function
            for name, weight in weights.items():
                self.register_buffer(name, weight)

        def forward(self, *args: Any) -> Any:
            return self.function(*args, **dict(self.named_buffers()))

    def run(function: Callable[..., Any], *calls: tuple[Any, ...], **weights: torch.Tensor) -> Any:
        model = optimize(Holder(function, weights).eval())
        for call in (*calls, calls[0]):
            wanted = function(*copy.deepcopy(call), **weights)
            torch.testing.assert_close(model(*copy.deepcopy(call)), wanted, rtol=1e-5, atol=1e-5)
        (graph,) = report(model).graphs
        assert graph.refused is None
        return graph

    return run
