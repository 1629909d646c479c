"""What a call of `generate` asks of the loop, and why ours does not run some calls: those go to transformers' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.fusion.generate.transformers_names import (
    OLD_POSITIONS,
    end_tokens,
    generation,
    holds_plain_layers,
    is_empty,
    overridden,
    pad_token,
)

# Of `generate`'s own arguments, those that only transformers' loops know.
FOREIGN = (
    "custom_generate",
    "assistant_model",
    "assistant_tokenizer",
    "streamer",
    "synced_gpus",
    "tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
ENCODER_DECODER_INPUTS = {"encoder_outputs", "attention_mask"}
DECODER_INPUTS = {"attention_mask", "position_ids", "logits_to_keep"}
# Prepared by `generate` and not read by the forward of a model with a cache of ours, or made anew by decoder.py.
DROPPED = {"past_key_values", "use_cache", "cache_position", "streamer", "synced_gpus", "decoder_attention_mask"}


@dataclass(frozen=True)
class Request:
    """One prepared call. Token ids are tensors on the model's device."""

    config: Any  # transformers' GenerationConfig
    inputs: Mapping[str, Any]  # for the model's forward
    cache: Any  # an empty one of transformers
    max_length: int
    beams: int
    group: int  # rows a sentence
    sample: bool
    end_tokens: torch.Tensor | None
    pad_token: torch.Tensor | None
    scores: bool  # what the result holds besides the tokens
    logits: bool
    as_dict: bool
    may_run_on: bool  # whether a step past the end is harmless; what it writes into a cache that is returned is not


def refused_arguments(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Why a call with these arguments of `generate` does not go to our loop, before anything is prepared."""
    given = [name for name in FOREIGN if arguments.get(name) is not None]
    if given:
        return f"generate: {given[0]} is given"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "generate: several processes"
    if model.training:
        return "generate: the model is in training mode"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "generate: weights on several devices"
    hook = overridden(model)
    if hook is not None:
        return f"generate: {type(model).__name__} has a {hook} of its own"
    if OLD_POSITIONS and not model.config.is_encoder_decoder:
        return "generate: a model without an encoder, transformers before 5"
    if "flash" in str(getattr(model.config, "_attn_implementation", "")):
        return "generate: flash attention keeps its own masks"
    return None


def refused_mode(config: Any) -> str | None:
    """Why a kind of generation is not ours; `config` as `generate` has prepared it."""
    mode = str(getattr(config.get_generation_mode(), "value", config.get_generation_mode()))
    return None if mode in MODES else f"generate: {mode}"


def refused(
    config: Any, model: Any, criteria: Sequence[Any], inputs: Mapping[str, Any], device: torch.device
) -> str | None:
    """Why a prepared call is not ours. `device`: of the prompt."""
    if device != model.device:
        return f"generate: inputs on {device}, the model on {model.device}"
    for name in ("output_attentions", "output_hidden_states", "token_healing", "prefill_chunk_size", "low_memory"):
        if getattr(config, name, None):
            return f"generate: {name}"
    if not inputs.get("use_cache"):
        return "generate: use_cache is off"
    if config.cache_implementation not in (None, "dynamic"):
        return f"generate: cache_implementation={config.cache_implementation!r}"
    cache = inputs.get("past_key_values")
    if cache is None or not is_empty(cache) or not holds_plain_layers(cache):
        return "generate: past_key_values is given, or does not keep every position"
    foreign = [type(criterion).__name__ for criterion in criteria if not _is_of_config(criterion, config)]
    if foreign:
        return f"generate: stopping criteria {foreign[0]}"
    encoder_decoder = model.config.is_encoder_decoder
    known = DROPPED | (ENCODER_DECODER_INPUTS if encoder_decoder else DECODER_INPUTS)
    unknown = sorted(name for name, value in inputs.items() if name not in known and value is not None)
    if unknown:
        return f"generate: {unknown[0]} is given"
    mask = inputs.get("decoder_attention_mask")
    if mask is not None and not bool(mask.all()):
        return "generate: decoder_attention_mask masks positions"
    if encoder_decoder and getattr(inputs["encoder_outputs"], "last_hidden_state", None) is None:
        return f"generate: encoder_outputs is a {type(inputs['encoder_outputs']).__name__}"
    return None


def _is_read(name: str, value: Any) -> bool:
    """Whether an input tells the model's forward something. A mask that masks nothing does not."""
    if name in DROPPED or value is None:
        return False
    return name != "attention_mask" or not bool(value.all())


def _is_of_config(criterion: Any, config: Any) -> bool:
    """Whether a criterion is one of the two that `generate` makes of every config, with its values."""
    if type(criterion) is generation.MaxLengthCriteria:
        return bool(criterion.max_length == config.max_length)
    ends = end_tokens(config)
    return type(criterion) is generation.EosTokenCriteria and (
        ends is not None and torch.equal(criterion.eos_token_id.to(ends.device), ends)
    )


def request_of(config: Any, inputs: Mapping[str, Any], device: torch.device) -> Request:
    as_dict = bool(config.return_dict_in_generate)
    return Request(
        config=config,
        inputs={name: value for name, value in inputs.items() if _is_read(name, value)},
        cache=inputs["past_key_values"],
        max_length=config.max_length,
        beams=config.num_beams or 1,
        group=max(config.num_beams or 1, config.num_return_sequences or 1),
        sample=bool(config.do_sample),
        end_tokens=end_tokens(config),
        pad_token=pad_token(config),
        scores=as_dict and bool(config.output_scores),
        logits=as_dict and bool(config.output_logits),
        as_dict=as_dict,
        may_run_on=device.type == "cuda" and not as_dict,
    )
