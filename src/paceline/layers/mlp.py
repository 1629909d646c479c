"""The MLP of a layer, gated (Shazeer, 2020: SwiGLU, GeGLU) or plain.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.kernels.activation import activate, gated
from paceline.layers.linear import Linear


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`; gate and up are one fused projection, gate's rows first."""

    def __init__(self, activation: str, gate_up: Linear, down: Linear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        hidden_TD: torch.Tensor = self.down(gated(self.gate_up(x_TD), self.activation))
        return hidden_TD


class PlainMLP(nn.Module):
    """`down(activation(up(x)))`."""

    def __init__(self, activation: str, up: Linear, down: Linear) -> None:
        super().__init__()
        self.up = up
        self.down = down
        self.activation = activation

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        hidden_TD: torch.Tensor = self.down(activate(self.up(x_TD), self.activation))
        return hidden_TD
