"""Products with what follows them, for graphs on a GPU: what passes/gpu_linear.py puts there, over any leading
dimensions."""

from __future__ import annotations

import torch

from paceline.kernels.add_norm import add_norm
from paceline.kernels.cuda_linear import cuda_linear, linear_norm
from paceline.kernels.gemv import Epilogue, Planes
from paceline.kernels.norm import NormWeights


def product(
    x: torch.Tensor,
    planes: Planes,
    bias: torch.Tensor | None,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x w^T + bias) + residual; with `gated`, activation(first half) * second half instead."""
    flat = None if residual is None else _rows(residual)
    y_TN = cuda_linear(_rows(x), planes, Epilogue(bias, activation, gated, flat))
    return y_TN.view(*x.shape[:-1], y_TN.shape[-1])


def product_norm(
    x: torch.Tensor, planes: Planes, bias: torch.Tensor | None, residual: torch.Tensor, norm: NormWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the norm of residual + x w^T + bias, that sum)."""
    y_TC, sum_TC = linear_norm(_rows(x), planes, norm, bias_N=bias, residual_TN=_rows(residual), keep_sum=True)
    assert sum_TC is not None
    return y_TC.view(residual.shape), sum_TC.view(residual.shape)


def product_only_normed(
    x: torch.Tensor, planes: Planes, bias: torch.Tensor | None, residual: torch.Tensor, norm: NormWeights
) -> torch.Tensor:
    """The norm of residual + x w^T + bias."""
    y_TC, _ = linear_norm(_rows(x), planes, norm, bias_N=bias, residual_TN=_rows(residual))
    return y_TC.view(residual.shape)


def sum_norm(x: torch.Tensor, residual: torch.Tensor, norm: NormWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """(the norm of residual + x, that sum)."""
    y_TC, sum_TC = add_norm(_rows(x), norm, residual_TC=_rows(residual), keep_sum=True)
    assert sum_TC is not None
    return y_TC.view(x.shape), sum_TC.view(x.shape)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[T, C], each row in one piece: a residual may be one that is laid out by channels (Whisper's, behind its
    convolutions)."""
    x_TC = x.reshape(-1, x.shape[-1])
    return x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()
