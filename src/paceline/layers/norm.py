"""RMS normalisation (Zhang and Sennrich, 2019) with a learned scale.

Shapes: T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.config import NormConfig
from paceline.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    With `config.unit_offset` the given weight is w and the norm multiplies by 1 + w; the 1 is added here, once.
    """

    def __init__(self, weight_C: torch.Tensor, config: NormConfig) -> None:
        super().__init__()
        # A plain attribute, not a buffer: nn.Module finds buffers through __getattr__, 0.4 us a look-up.
        self.weight_C = weight_C + 1 if config.unit_offset else weight_C
        self.eps = config.eps

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TC, self.weight_C, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight_C.shape[-1]}, eps={self.eps}"
