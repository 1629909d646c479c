"""Which implementation runs a checkpoint: our definition (models/decoder.py) or transformers' own modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from paceline.config import DecoderConfig
from paceline.errors import UnsupportedModelError
from paceline.log import get_logger
from paceline.models.fallback import SLOWER, FallbackConfig, read_fallback_config
from paceline.models.multimodal import MULTIMODAL
from paceline.models.registry import ARCHITECTURES, read_decoder_config

log = get_logger(__name__)

Implementation = Literal["paceline", "transformers"]


def choose_config(hf_config: Mapping[str, Any], model_impl: str) -> DecoderConfig | FallbackConfig:
    """The configuration, by its type, of the implementation that runs the model of a config.json (parsed).

    "auto" takes ours where a family reads the model, and otherwise transformers', which it says in the log. Raises
    UnsupportedModelError, naming the reason of each implementation that was asked; CheckpointError for a config.json
    that is incomplete.
    """
    if model_impl == "transformers":
        return read_fallback_config(hf_config)
    try:
        return read_decoder_config(hf_config)
    except UnsupportedModelError as error:
        if model_impl == "paceline":
            raise
        ours = error
    known = any(
        architecture in ARCHITECTURES or architecture in MULTIMODAL
        for architecture in hf_config.get("architectures") or ()
    )
    why = str(ours) if known else "paceline has no family for it"
    try:
        config = read_fallback_config(hf_config, why)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{ours}; and {error}") from error
    log.warning("%s runs through transformers' own modules, which is slower (%s): %s", config.architecture, SLOWER, why)
    return config


def implementation_of(config: DecoderConfig | FallbackConfig) -> Implementation:
    return "paceline" if isinstance(config, DecoderConfig) else "transformers"
