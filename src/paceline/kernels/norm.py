"""Root-mean-square norm (Zhang and Sennrich, 2019) and layer norm (Ba et al., 2016).

`rms_norm` and `layer_norm` are plain torch and take anything; `norm_rows` is both as one Triton kernel
(kernels/norm_triton.py), for CUDA where `norm_refusal` finds nothing against it. kernels/add_norm.py is the same kernel
with what is added before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from paceline.kernels.gpu import gpu, launch_options, triton_refusal
from paceline.kernels.scaled_linear import ScaledRows, empty_rows

# A program holds a row in registers: 32 values a thread in 16 warps.
MOST_CHANNELS = 16384


@dataclass(frozen=True)
class NormWeights:
    """A layer norm where `centred`, else an RMS norm, which may have a bias here too. No weight: ones."""

    weight_C: torch.Tensor | None
    bias_C: torch.Tensor | None
    eps: float
    centred: bool


def rms_norm(x_TC: torch.Tensor, weight_C: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32, in x's dtype."""
    return F.rms_norm(x_TC, (x_TC.shape[-1],), weight_C, eps)


def rms_norm_ref(x_TC: torch.Tensor, weight_C: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The same by the definition."""
    x = x_TC.float()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (normed if weight_C is None else normed * weight_C.float()).to(x_TC.dtype)


def layer_norm(
    x_TC: torch.Tensor, weight_C: torch.Tensor | None, bias_C: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, computed in float32, in x's dtype."""
    return F.layer_norm(x_TC, (x_TC.shape[-1],), weight_C, bias_C, eps)


def layer_norm_ref(
    x_TC: torch.Tensor, weight_C: torch.Tensor | None, bias_C: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The same by the definition."""
    x = x_TC.float()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight_C is not None:
        normed = normed * weight_C.float()
    return (normed if bias_C is None else normed + bias_C.float()).to(x_TC.dtype)


def norm_refusal(x_TC: torch.Tensor) -> str | None:
    """Why norm_rows cannot take x; None when it can."""
    return triton_refusal(x_TC.device, x_TC.dtype) or norm_shape_refusal(x_TC)


def norm_shape_refusal(x_TC: torch.Tensor) -> str | None:
    """norm_refusal without the device: what the interpreter, too, cannot take."""
    if x_TC.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype is {x_TC.dtype}"
    if x_TC.shape[-1] > MOST_CHANNELS:
        return f"{x_TC.shape[-1]} channels, and the kernel takes {MOST_CHANNELS}"
    if x_TC.dim() != 2 or x_TC.stride(1) != 1:
        return "x is no matrix of whole rows"
    return None


def norm_rows(
    x_TC: torch.Tensor, weight_C: torch.Tensor | None, bias_C: torch.Tensor | None, eps: float, *, centred: bool
) -> torch.Tensor:
    """layer_norm where `centred`, else rms_norm plus the bias if there is one; [T, C] in x's dtype. x may have any row
    stride.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, and waits for that
    one's end before it reads x or writes.
    """
    y_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
    launch_norm(x_TC, NormWeights(weight_C, bias_C, eps, centred), y_TC)
    return y_TC


def scaled_norm_rows(
    x_TC: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor | None, eps: float, *, centred: bool
) -> ScaledRows:
    """quantize_rows of norm_rows in the same kernel, to the bit."""
    y = empty_rows(x_TC.shape[0], x_TC.shape[1], x_TC.device)
    launch_norm(x_TC, NormWeights(weight_C, bias_C, eps, centred), y.q_TK, scale_T1=y.scale_T1)
    return y


def launch_norm(
    x_TC: torch.Tensor,
    norm: NormWeights,
    y_TC: torch.Tensor,
    *,
    scale_T1: torch.Tensor | None = None,
    residual_TC: torch.Tensor | None = None,
    added_C: torch.Tensor | None = None,
    sum_TC: torch.Tensor | None = None,
) -> None:
    """The kernel with its arguments as kernels/norm_triton.py has them. x may be the parts of a product split over K,
    [P, T, C] in float32."""
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    import triton

    from paceline.kernels.norm_triton import norm_kernel

    if y_TC.numel() == 0:
        return
    rows, channels = y_TC.shape
    tile = triton.next_power_of_2(channels)
    dependent = gpu(x_TC.device).dependent
    norm_kernel[(rows,)](
        x_TC,
        norm.weight_C,
        norm.bias_C,
        y_TC,
        scale_T1,
        residual_TC,
        added_C,
        sum_TC,
        x_TC.stride(-2),
        0 if residual_TC is None else residual_TC.stride(0),
        norm.eps,
        C=channels,
        TILE=tile,
        PARTS=1 if x_TC.dim() == 2 else x_TC.shape[0],
        CENTRED=norm.centred,
        DEPENDENT=dependent,
        num_warps=max(1, min(16, tile // 512)),
        **launch_options(dependent),
    )
