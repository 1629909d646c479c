"""Every name of transformers that `model.generate` is replaced by means of, and that is private or has moved between
4.56 and 5.x. tests/fusion/generate/test_transformers_names.py fails where a version lacks one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

# Without types: those of one version are not those of another.
generation: Any = import_module("transformers.generation")
_caches: Any = import_module("transformers.cache_utils")
Cache, CacheLayerMixin = _caches.Cache, _caches.CacheLayerMixin
DynamicCache, EncoderDecoderCache = _caches.DynamicCache, _caches.EncoderDecoderCache

__all__ = [
    "OLD_POSITIONS",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "EncoderDecoderCache",
    "attention_of",
    "can_be_fixed",
    "end_tokens",
    "generation",
    "holds_plain_layers",
    "is_empty",
    "output_class",
    "overridden",
    "own_loop",
    "pad_token",
]

# Before 5, forwards are told positions by `cache_position`, and position ids are made while inputs are prepared.
OLD_POSITIONS = int(import_module("transformers").__version__.split(".")[0]) < 5

# What a model class may define to change the loop itself; ours does as GenerationMixin does.
LOOP_HOOKS = (
    "generate",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_reorder_cache",
    "_sample",
    "_beam_search",
)
# Whisper cuts sound into pieces and generates each as all others do; it prepares its inputs itself where a decoder's
# mask is given, which ours refuses.
KNOWN_HOOKS = {"WhisperGenerationMixin.generate", "WhisperForConditionalGeneration.prepare_inputs_for_generation"}


def end_tokens(config: Any) -> torch.Tensor | None:
    """The ids that end a sequence, as `generate` has prepared them (int64, one dimension)."""
    return config._eos_token_tensor  # type: ignore[no-any-return]


def pad_token(config: Any) -> torch.Tensor | None:
    """The id that fills a sequence past its end, as `generate` has prepared it (int64, no dimension)."""
    return config._pad_token_tensor  # type: ignore[no-any-return]


def can_be_fixed(model: Any) -> bool:
    """Whether the model takes masks that are made (four dimensions, of truth values) and positions on the device."""
    return not OLD_POSITIONS and attention_of(model) == "sdpa"


def attention_of(model: Any) -> str | None:
    """The implementation of attention that all parts of the model use, None where they differ."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    found = {config._attn_implementation for config in configs if hasattr(config, "_attn_implementation")}
    return str(found.pop()) if len(found) == 1 else None


def own_loop(model: Any, beams: bool) -> Callable[..., Any]:
    """transformers' own loop for prepared arguments, of one process and without a streamer."""
    if beams:
        return functools.partial(model._beam_search, synced_gpus=False)
    return functools.partial(model._sample, synced_gpus=False, streamer=None)


def overridden(model: Any) -> str | None:
    """A method by which the model's class changes the loop, None where it has the common one."""
    for hook in LOOP_HOOKS:
        method = getattr(type(model), hook, None)
        if method is None or method is getattr(generation.GenerationMixin, hook, None):
            continue
        if method.__qualname__ not in KNOWN_HOOKS:
            return hook
    return None


def is_empty(cache: Any) -> bool:
    """Whether the cache is one that `generate` has just made."""
    return not getattr(cache, "_is_user_defined", False) and int(cache.get_seq_length()) == 0


def holds_plain_layers(cache: Any) -> bool:
    """Whether the cache keeps every position of every layer: no windows, states, quantization or offloading."""
    if isinstance(cache, EncoderDecoderCache):
        return holds_plain_layers(cache.self_attention_cache) and holds_plain_layers(cache.cross_attention_cache)
    layers = [type(layer).__name__ for layer in cache.layers]
    return type(cache) is DynamicCache and not cache.offloading and set(layers) <= {"DynamicLayer"}


def output_class(encoder_decoder: bool, beams: bool) -> Any:
    """The class of what `generate` returns with `return_dict_in_generate`."""
    name = f"Generate{'Beam' if beams else ''}{'EncoderDecoder' if encoder_decoder else 'DecoderOnly'}Output"
    return getattr(generation, name)
