"""Root-mean-square norm (Zhang and Sennrich, 2019) and layer norm (Ba et al., 2016)."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def rms_norm(x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32, in x's dtype."""
    return F.rms_norm(x_TC, (x_TC.shape[-1],), weight_C, eps)


def rms_norm_ref(x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
    """The same by the definition."""
    x = x_TC.float()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight_C.float()).to(x_TC.dtype)


def layer_norm(x_TC: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, computed in float32, in x's dtype."""
    return F.layer_norm(x_TC, (x_TC.shape[-1],), weight_C, bias_C, eps)


def layer_norm_ref(x_TC: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The same by the definition."""
    x = x_TC.float()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight_C.float()
    return (normed if bias_C is None else normed + bias_C.float()).to(x_TC.dtype)
