"""Norms with a learned scale: root mean square (Zhang and Sennrich, 2019) and layer norm (Ba et al., 2016).

Shapes: T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.config import NormConfig
from paceline.kernels.choices import Choice, either
from paceline.kernels.elementwise import COMPILED_ROWS, PLAIN
from paceline.kernels.gpu import triton_refusal
from paceline.kernels.norm import norm_refusal, norm_rows, norm_shape_refusal, scaled_norm_rows
from paceline.kernels.scaled_linear import ScaledRows, quantize_rows


class Norm(nn.Module):
    """The norm that `config` describes, over the last dimension. `bias_C` is there when `config.bias` is.

    With `config.unit_offset` the given weight is w and the norm multiplies by 1 + w; the 1 is added here, once.
    """

    def __init__(self, config: NormConfig, weight_C: torch.Tensor, bias_C: torch.Tensor | None = None) -> None:
        super().__init__()
        # Plain attributes, not buffers: nn.Module finds buffers through __getattr__, 0.4 us a look-up.
        self.weight_C = weight_C + 1 if config.unit_offset else weight_C
        self.bias_C = bias_C
        self.kind = config.kind
        self.eps = config.eps
        self.ops = PLAIN

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        if norm_refusal(x_TC) is None:
            return norm_rows(x_TC, self.weight_C, self.bias_C, self.eps, centred=self.kind == "layer")
        return self.plain(x_TC)

    def scaled(self, x_TC: torch.Tensor) -> ScaledRows:
        """The same as a product in fp8 takes it."""
        if norm_refusal(x_TC) is None:
            return scaled_norm_rows(x_TC, self.weight_C, self.bias_C, self.eps, centred=self.kind == "layer")
        return quantize_rows(self.plain(x_TC))

    def plain(self, x_TC: torch.Tensor) -> torch.Tensor:
        """The same by torch's operation, or as compiled."""
        if self.kind == "rms":
            return self.ops.rms_norm(x_TC, self.weight_C, self.eps)
        return self.ops.layer_norm(x_TC, self.weight_C, self.bias_C, self.eps)

    def choices(self, rows: int, dtype: torch.dtype, device: torch.device) -> list[Choice]:
        plain = f"torch's {self.kind}_norm"
        if rows >= COMPILED_ROWS and self.ops != PLAIN:
            plain = "torch.compile"
        x_TC = torch.empty(rows, self.weight_C.shape[0], dtype=dtype, device="meta")
        refusal = triton_refusal(device, dtype) or norm_shape_refusal(x_TC)
        return [Choice(f"{self.kind} norm", *either(refusal, "Triton, a row a program", plain))]

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.weight_C.shape[-1]}, eps={self.eps}"
