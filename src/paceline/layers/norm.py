"""Norms with a learned scale: root mean square (Zhang and Sennrich, 2019) and layer norm (Ba et al., 2016).

Shapes: T tokens, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from paceline.config import NormConfig
from paceline.kernels.add_norm import add_norm_, in_place_refusal, scaled_add_norm_
from paceline.kernels.choices import Choice, either
from paceline.kernels.elementwise import COMPILED_ROWS, PLAIN
from paceline.kernels.gpu import triton_refusal
from paceline.kernels.norm import NormWeights, norm_refusal, norm_rows, norm_shape_refusal, scaled_norm_rows
from paceline.kernels.scaled_linear import ScaledRows, quantize_rows


class Unadded(NamedTuple):
    """The residual stream before an addition, which is left to the norm after it: x + half. That norm may put its
    results where these lie, so whoever makes one gives both up."""

    x_TC: torch.Tensor
    half_TC: torch.Tensor

    def added(self) -> torch.Tensor:
        return self.x_TC + self.half_TC


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

    def forward(self, x: torch.Tensor | Unadded) -> torch.Tensor:
        if isinstance(x, Unadded):
            return self.of_sum(x)[0]
        if norm_refusal(x) is None:
            return norm_rows(x, self.weight_C, self.bias_C, self.eps, centred=self.kind == "layer")
        return self.plain(x)

    def scaled(self, x_TC: torch.Tensor) -> ScaledRows:
        """The same as a product in fp8 takes it."""
        if norm_refusal(x_TC) is None:
            return scaled_norm_rows(x_TC, self.weight_C, self.bias_C, self.eps, centred=self.kind == "layer")
        return quantize_rows(self.plain(x_TC))

    def of_sum(self, x: Unadded) -> tuple[torch.Tensor, torch.Tensor]:
        """(the norm of the sum, the sum), by one kernel; to the bit as by one after the other."""
        if self._sum_refusal(x) is None:
            add_norm_(x.half_TC, self._weights(), x.x_TC)
            return x.half_TC, x.x_TC
        sum_TC = x.added()
        return self.forward(sum_TC), sum_TC

    def scaled_of_sum(self, x: Unadded) -> tuple[ScaledRows, torch.Tensor]:
        """The same as a product in fp8 takes it."""
        if self._sum_refusal(x) is None:
            return scaled_add_norm_(x.half_TC, self._weights(), x.x_TC), x.x_TC
        sum_TC = x.added()
        return self.scaled(sum_TC), sum_TC

    def _sum_refusal(self, x: Unadded) -> str | None:
        return in_place_refusal(x.x_TC) or in_place_refusal(x.half_TC)

    def _weights(self) -> NormWeights:
        return NormWeights(self.weight_C, self.bias_C, self.eps, self.kind == "layer")

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
