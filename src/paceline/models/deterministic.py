"""`deterministic=True`: a request's numbers do not depend, by a single bit, on its neighbours, its chunks, a prefix hit
or a preemption.

What makes them depend on these in a model is which rows share a step: everything here computes a row as if it were
alone. Norms, rotary angles and attention (kernels/varlen_attention.py, for every step) do so anyway; products and
activations do once the modules hold other weights and operations.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from paceline.errors import UsageError
from paceline.formats.invariant import InvariantWeight
from paceline.kernels.elementwise import PLAIN
from paceline.kernels.invariant import row_by_row
from paceline.layers.attention import Attention
from paceline.layers.linear import Linear
from paceline.models.decoder import Decoder
from paceline.models.model import Model

# Float32 values in what CUDA aligns its reads to: 16 bytes, and twice that on the newest.
ALIGNED = 8

OPS = replace(PLAIN, gated=row_by_row(PLAIN.gated), activate=row_by_row(PLAIN.activate))


def make_deterministic(model: Model) -> None:
    """Change `model`'s parts in place. Raises UsageError for a model that cannot be changed so."""
    if not isinstance(model, Decoder):
        raise UsageError("deterministic: transformers' own modules run this model, and add up as their step is large")
    if model.config.moe is not None:
        raise UsageError("deterministic: the router of a mixture of experts multiplies all of a step's tokens at once")
    refusal = vocabulary_refusal(model.vocab_size, model.device)
    if refusal is not None:
        raise UsageError(f"deterministic: {refusal}")
    tried: set[tuple[object, ...]] = set()
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.deterministic = True
        if not isinstance(module, Linear):
            continue
        weight = InvariantWeight(module.weight, model.dtype, model.device)
        kind = (type(module.weight), weight.shape)
        refusal = None if kind in tried else weight.refusal()
        if refusal is not None:
            raise UsageError(f"deterministic: {name} on {model.device}: {refusal}; try another dtype or quantization")
        tried.add(kind)
        module.weight, module.ops = weight, OPS


def vocabulary_refusal(size: int, device: torch.device) -> str | None:
    """Why log probabilities over so many tokens would depend on the row they are in; None where they do not."""
    if device.type == "cuda" and size % ALIGNED:
        return (
            f"a vocabulary of {size} is no multiple of {ALIGNED}, and CUDA's softmax sums rows by how they are aligned"
        )
    return None
