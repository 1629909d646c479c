"""The gated MLP (Shazeer, 2020): SwiGLU, GeGLU.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.config import MlpConfig
from paceline.kernels.activation import gated
from paceline.layers.linear import Linear


class MLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`; gate and up are one fused projection, gate's rows first."""

    def __init__(self, config: MlpConfig, gate_up: Linear, down: Linear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = config.activation

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        hidden_TD: torch.Tensor = self.down(gated(self.gate_up(x_TD), self.activation))
        return hidden_TD
