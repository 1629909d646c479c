"""Tiny random encoder-decoders and what they are asked, as transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

VOCAB = 60


def _t5() -> Any:
    config = transformers.T5Config(
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def _bart_like(kind: str) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "bos_token_id": 0,
        "decoder_start_token_id": 2 if kind == "bart" else 1,
        "tie_word_embeddings": False,
    }


def _bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**_bart_like("bart")))


def _marian() -> Any:
    return transformers.MarianMTModel(transformers.MarianConfig(**_bart_like("marian")))


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=30,
        max_target_positions=96,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=0,
        decoder_start_token_id=3,
        tie_word_embeddings=False,
    )
    return transformers.WhisperForConditionalGeneration(config)


# The deviation of the weights for which a family's texts repeat themselves least.
MAKERS: dict[str, tuple[Callable[[], Any], float]] = {
    "t5": (_t5, 0.2),
    "bart": (_bart, 0.1),
    "marian": (_marian, 0.1),
    "whisper": (_whisper, 0.8),
}


@pytest.fixture(scope="session")
def encoder_decoders() -> dict[str, Any]:
    """A model a family, float32, with an output head of its own."""
    models = {}
    for name, (make, deviation) in MAKERS.items():
        torch.manual_seed(2)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.data.normal_(0, deviation)
        models[name] = model
    return models


@pytest.fixture(params=list(MAKERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str, encoder_decoders: dict[str, Any]) -> Any:
    return encoder_decoders[family]


@pytest.fixture
def inputs() -> Callable[[Any, int], dict[str, torch.Tensor]]:
    """(model, batch) -> arguments of `generate`: sentences of different lengths with padding, or sound."""

    def make(model: Any, batch: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        if model.config.model_type == "whisper":
            return {"input_features": torch.randn(batch, 8, 60, generator=generator)}
        ids = torch.randint(3, VOCAB, (batch, 9), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, 9 - 2 * row :] = 0
        return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}

    return make
