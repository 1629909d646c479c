"""residual + x + bias, normed: what stands between one block of a transformer and the next, in one pass.

`add_norm_ref` is plain torch and takes anything; `add_norm` is the kernel of kernels/norm_triton.py, for CUDA where
`norm_refusal` (kernels/norm.py) finds nothing against x. `add_norm_` and `scaled_add_norm_` are the same without memory
of their own, where `in_place_refusal` finds nothing either.

Shapes: T tokens, C channels; P parts of a product that was split over its inputs.
"""

from __future__ import annotations

import torch

from paceline.kernels.norm import NormWeights, launch_norm, layer_norm, norm_refusal, rms_norm
from paceline.kernels.scaled_linear import ScaledRows, empty_rows


def add_norm_ref(
    x_TC: torch.Tensor,
    norm: NormWeights,
    *,
    residual_TC: torch.Tensor | None = None,
    bias_C: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the sum, the sum) by plain torch ops, each rounded to x's dtype."""
    sum_TC = x_TC if bias_C is None else x_TC + bias_C
    sum_TC = sum_TC if residual_TC is None else sum_TC + residual_TC
    if norm.centred:
        return layer_norm(sum_TC, norm.weight_C, norm.bias_C, norm.eps), sum_TC
    y_TC = rms_norm(sum_TC, norm.weight_C, norm.eps)
    return (y_TC if norm.bias_C is None else y_TC + norm.bias_C), sum_TC


def add_norm(
    x_TC: torch.Tensor,
    norm: NormWeights,
    *,
    residual_TC: torch.Tensor | None = None,
    bias_C: torch.Tensor | None = None,
    keep_sum: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the norm of residual + x + bias, and that sum where `keep_sum`), both contiguous [T, C] in `dtype`, x's own if
    None. `bias_C` is that of the linear that made x.

    A sum with a residual is rounded to the residual's dtype before it is normed: without a bias, and with x in that
    dtype, both are to the bit what an addition and a norm after it give.

    x and the residual may have any row stride. x may also be [P, T, C], contiguous float32: what is normed is then the
    sum of its parts, always in the same order.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, and waits for that
    one's end before it reads x and the residual or writes.
    """
    y_TC = torch.empty(x_TC.shape[-2:], dtype=dtype or x_TC.dtype, device=x_TC.device)
    sum_TC = torch.empty_like(y_TC) if keep_sum else None
    launch_norm(x_TC, norm, y_TC, residual_TC=residual_TC, added_C=bias_C, sum_TC=sum_TC)
    return y_TC, sum_TC


def in_place_refusal(x_TC: torch.Tensor) -> str | None:
    """Why add_norm_ and scaled_add_norm_ can take no such x, nor such a residual; None when they can."""
    return norm_refusal(x_TC) or (None if x_TC.is_contiguous() else "rows are a stride apart")


def add_norm_(x_TC: torch.Tensor, norm: NormWeights, residual_TC: torch.Tensor) -> None:
    """add_norm whose norm lies where x lay, and whose sum where the residual did; both contiguous, in one dtype."""
    launch_norm(x_TC, norm, x_TC, residual_TC=residual_TC, sum_TC=residual_TC)


def scaled_add_norm_(x_TC: torch.Tensor, norm: NormWeights, residual_TC: torch.Tensor) -> ScaledRows:
    """quantize_rows of what add_norm_ leaves in x, to the bit; x stays. The sum lies where the residual lay."""
    y = empty_rows(x_TC.shape[0], x_TC.shape[1], x_TC.device)
    launch_norm(x_TC, norm, y.q_TK, scale_T1=y.scale_T1, residual_TC=residual_TC, sum_TC=residual_TC)
    return y
