"""Gated activations of the MLP (Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch.nn import functional as F

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
)


def gated(gate_up_TC: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, for [gate, up] side by side in the last dimension."""
    gate, up = gate_up_TC.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def gated_ref(gate_up_TC: torch.Tensor, activation: str) -> torch.Tensor:
    """The same in float32, by the definitions of SiLU and GELU."""
    gate, up = gate_up_TC.float().chunk(2, dim=-1)
    if activation == "silu":
        weight = torch.sigmoid(gate)
    elif activation == "gelu":
        weight = 0.5 * (1 + torch.erf(gate / 2**0.5))
    else:
        weight = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return (gate * weight * up).to(gate_up_TC.dtype)
