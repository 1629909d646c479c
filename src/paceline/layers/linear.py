"""A linear layer with what goes before and after it: one weight in some storage format, and optionally a bias.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.formats import Weight
from paceline.formats.w8a8_fp8 import W8A8Weight
from paceline.kernels.choices import Choice, either
from paceline.kernels.elementwise import PLAIN
from paceline.kernels.gated import gated_refusal, gated_rows
from paceline.kernels.gemv import Epilogue, Planes, device_refusal, fuses_norm, gemv, gemv_refusal, shape_refusal
from paceline.kernels.gemv import Norm as RMSNorm
from paceline.kernels.scaled_linear import ScaledRows
from paceline.layers.norm import Norm


class Linear(nn.Module):
    """`residual + activation(norm(x) @ weight.T + bias)`, each part but the product optional.

    Few rows on CUDA go through one kernel that reads the packed weight once (kernels/gemv.py); everything else through
    `plain`, its twin, where the weight's format does the multiplication. The weight is not an nn.Parameter: it may be
    packed into planes that mean nothing to autograd or to `.to()`. dtype and device are chosen once, when it is packed.
    """

    def __init__(self, weight: Weight, bias_N: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias_N = bias_N
        self.ops = PLAIN

    def forward(
        self,
        x_TK: torch.Tensor | ScaledRows,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual_TN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, K] -> [T, N]; [T, N / 2] when `gated`: the activation of the first half times the second. x is in fp8
        only where `scales` says that its product is."""
        planes = self.weight.planes
        if planes is None or isinstance(x_TK, ScaledRows) or gemv_refusal(x_TK, planes) is not None:
            return self.plain(x_TK, norm=norm, activation=activation, gated=gated, residual_TN=residual_TN)
        inside = None
        if norm is not None and _fits_inside(norm, x_TK, planes):
            inside, norm = RMSNorm(norm.weight_C, norm.eps), None
        normed_TK = x_TK if norm is None else norm(x_TK)
        return gemv(normed_TK, planes, norm=inside, epilogue=Epilogue(self.bias_N, activation, gated, residual_TN))

    def plain(
        self,
        x_TK: torch.Tensor | ScaledRows,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual_TN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same, one operation after the other, each rounded to x's dtype; a gated activation is one operation on
        CUDA."""
        if norm is not None and not isinstance(x_TK, ScaledRows):
            x_TK = norm.scaled(x_TK) if self.scales(x_TK) else norm(x_TK)
        y_TN = self._multiply(x_TK)
        if activation is not None and gated:
            plainly = gated_refusal(y_TN) is not None
            y_TN = self.ops.gated(y_TN, activation) if plainly else gated_rows(y_TN, activation)
        elif activation is not None:
            y_TN = self.ops.activate(y_TN, activation)
        return y_TN if residual_TN is None else residual_TN + y_TN

    def adds(self, residual_TN: torch.Tensor) -> bool:
        """Whether a residual of so many rows is added inside the product's kernel, not by an operation after it."""
        planes = self.weight.planes
        return planes is not None and gemv_refusal(residual_TN, planes) is None

    def scales(self, x_TK: torch.Tensor | ScaledRows) -> bool:
        """Whether the product of so many rows has them in fp8."""
        return isinstance(self.weight, W8A8Weight) and self.weight.scales(x_TK.shape[0])

    def _multiply(self, x_TK: torch.Tensor | ScaledRows) -> torch.Tensor:
        if isinstance(x_TK, ScaledRows):
            assert isinstance(self.weight, W8A8Weight)
            return self.weight.matmul_scaled(x_TK, self.bias_N)
        return self.weight.matmul(x_TK, self.bias_N)

    def choices(self, rows: int, dtype: torch.dtype, device: torch.device, name: str) -> list[Choice]:
        """The product of the linear that its model calls `name`."""
        N, K = self.weight.shape
        kernel, reason = self.weight.route(rows)
        if device.type == "cuda" and self.weight.planes is not None:
            refusal = self._refusal(rows, dtype, device)
            kernel, reason = either(refusal, "Triton GEMV, what follows included", kernel)
        bits = 8 * self.weight.nbytes / max(N * K, 1)
        return [Choice(f"{name} {N} x {K}, {bits:.3g} bits a value", kernel, reason)]

    def takes(self, norm: Norm, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether `norm` before it is part of the same kernel, as `forward` decides it."""
        planes = self.weight.planes
        if planes is None or self._refusal(rows, dtype, device) is not None:
            return False
        return _fits_inside(norm, self._like_x(rows, dtype), planes)

    def _refusal(self, rows: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """gemv_refusal, also of a GPU that is not here."""
        planes = self.weight.planes
        assert planes is not None
        return device_refusal(device, dtype, planes) or shape_refusal(self._like_x(rows, dtype), planes)

    def _like_x(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, self.weight.shape[1], dtype=dtype, device="meta")

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{columns} -> {rows}, {type(self.weight).__name__}, bias={self.bias_N is not None}"


def _fits_inside(norm: Norm, x_TK: torch.Tensor, planes: Planes) -> bool:
    """Whether the product's kernel has such a norm, and is quicker with it inside."""
    return norm.kind == "rms" and norm.bias_C is None and fuses_norm(x_TK, planes)
