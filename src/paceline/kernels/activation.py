"""Activations of the MLP, plain and gated (Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch.nn import functional as F


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "quick_gelu": quick_gelu,
        "tanh": torch.tanh,
    }
)


def activate(x_TC: torch.Tensor, activation: str) -> torch.Tensor:
    return ACTIVATIONS[activation](x_TC)


def gated(gate_up_TC: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, for [gate, up] side by side in the last dimension."""
    gate, up = gate_up_TC.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def activate_ref(x_TC: torch.Tensor, activation: str) -> torch.Tensor:
    """The same in float32, by the definitions."""
    x = x_TC.float()
    if activation == "silu":
        weight = torch.sigmoid(x)
    elif activation == "gelu":
        weight = 0.5 * (1 + torch.erf(x / 2**0.5))
    elif activation == "relu":
        weight = (x > 0).float()
    elif activation == "quick_gelu":
        weight = torch.sigmoid(1.702 * x)
    elif activation == "tanh":
        return torch.tanh(x).to(x_TC.dtype)
    else:
        weight = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return (x * weight).to(x_TC.dtype)


def gated_ref(gate_up_TC: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = gate_up_TC.float().chunk(2, dim=-1)
    return (activate_ref(gate, activation) * up).to(gate_up_TC.dtype)
