"""The MLP of a layer, gated (Shazeer, 2020: SwiGLU, GeGLU) or plain.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.kernels.gated import scaled_gated_rows
from paceline.kernels.scaled_linear import ScaledRows
from paceline.layers.linear import Linear
from paceline.layers.norm import Norm


class GatedMLP(nn.Module):
    """`residual + down(activation(gate(x)) * up(x))` of x = norm(x); gate and up are one projection, gate's rows first.
    Without `norm` and `residual_TD` there is no such step."""

    def __init__(self, activation: str, gate_up: Linear, down: Linear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def forward(
        self,
        x_TD: torch.Tensor | ScaledRows,
        *,
        norm: Norm | None = None,
        residual_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.down.scales(x_TD):
            inner_TD = scaled_gated_rows(self.gate_up(x_TD, norm=norm), self.activation)
        else:
            inner_TD = self.gate_up(x_TD, norm=norm, activation=self.activation, gated=True)
        hidden_TD: torch.Tensor = self.down(inner_TD, residual_TN=residual_TD)
        return hidden_TD


class PlainMLP(nn.Module):
    """`residual + down(activation(up(norm(x))))`, as GatedMLP."""

    def __init__(self, activation: str, up: Linear, down: Linear) -> None:
        super().__init__()
        self.up = up
        self.down = down
        self.activation = activation

    def forward(
        self,
        x_TD: torch.Tensor | ScaledRows,
        *,
        norm: Norm | None = None,
        residual_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inner_TD = self.up(x_TD, norm=norm, activation=self.activation)
        hidden_TD: torch.Tensor = self.down(inner_TD, residual_TN=residual_TD)
        return hidden_TD
