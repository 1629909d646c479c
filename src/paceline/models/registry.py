"""The families, and which of them reads a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from paceline.config import DecoderConfig
from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.models.families import (
    bloom,
    falcon,
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    mixtral,
    mpt,
    olmo,
    opt,
    phi3,
    qwen,
    qwen3_moe,
    smollm3,
    stablelm,
    starcoder2,
)
from paceline.models.family import Family
from paceline.models.hf_config import HFConfig
from paceline.models.multimodal import MULTIMODAL, text_config
from paceline.registry import unknown

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            *(llama.FAMILY, qwen.FAMILY, gemma.FAMILY),
            *(gpt2.FAMILY, gpt2.BIG_CODE, gpt_neox.FAMILY, opt.FAMILY, starcoder2.FAMILY),
            *(bloom.FAMILY, falcon.FAMILY, mpt.FAMILY),
            *(mistral.FAMILY, mixtral.FAMILY, qwen3_moe.FAMILY, phi3.FAMILY, smollm3.FAMILY),
            *(olmo.FAMILY, granite.FAMILY, stablelm.FAMILY),
        )
    }
)

ARCHITECTURES: Mapping[str, Family] = MappingProxyType(
    {architecture: family for family in FAMILIES.values() for architecture in family.architectures}
)


def read_decoder_config(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """The DecoderConfig that a Hugging Face config.json (parsed) describes; of a multimodal model, its text part.

    Raises UnsupportedModelError for an architecture or a feature that no family implements, naming the nearest
    supported architecture or the key; CheckpointError for a config.json that is incomplete.
    """
    architectures = hf_config.get("architectures") or []
    for architecture in architectures:
        if architecture in MULTIMODAL:
            return read_decoder_config(text_config(hf_config, architecture))
        if architecture in ARCHITECTURES:
            hf = HFConfig({**hf_config, "architectures": [architecture]})
            config = ARCHITECTURES[architecture].decoder_config(hf)
            hf.check()
            return config
    if not architectures:
        raise CheckpointError("config.json has no 'architectures': it does not say what the model is")
    raise UnsupportedModelError(unknown("architecture", str(architectures[0]), [*ARCHITECTURES, *MULTIMODAL]))


def family_of(config: DecoderConfig) -> Family:
    """The family that `config.family` names."""
    return FAMILIES[config.family]
