"""A linear layer: one weight in some storage format, and optionally a bias.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.formats import Weight


class Linear(nn.Module):
    """`y_TN = x_TK @ weight_NK.T + bias_N`. The weight's format does the multiplication.

    The weight is not an nn.Parameter: it may be packed into planes that mean nothing to autograd or to `.to()`.
    dtype and device are chosen once, when the weight is packed.
    """

    def __init__(self, weight: Weight, bias_N: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias_N = bias_N

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.weight.matmul(x_TK, self.bias_N)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{columns} -> {rows}, {type(self.weight).__name__}, bias={self.bias_N is not None}"
