# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton side of kernels/norm.py: one program a row.

Shapes: R rows of C channels; TILE is C padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.kernels.scaled_linear_triton import store_scaled


@triton.jit
def norm_kernel(
    x_ptr,  # [R, C], rows x_stride apart; of a split product [PARTS, R, C], float32 and contiguous
    weight_ptr,  # [C]; None: ones
    bias_ptr,  # [C]; None: no bias
    y_ptr,  # [R, C], contiguous, may be x
    scale_ptr,  # float32 [R], and y is in fp8; None: y is not
    residual_ptr,  # [R, C], rows residual_stride apart, added to x first; None: nothing
    added_ptr,  # [C], added to x first; None: nothing
    sum_ptr,  # [R, C], contiguous, may be the residual: x with what is added; None: it is not wanted
    x_stride,
    residual_stride,
    eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    CENTRED: tl.constexpr,  # layer norm
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, TILE)
    inside = cols < C
    if DEPENDENT:
        gdc_launch_dependents()
    # The model's own: no kernel before this one writes them.
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if added_ptr is not None:
        added = tl.load(added_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + (part * tl.num_programs(0) + row) * x_stride + cols, mask=inside, other=0.0)
    if added_ptr is not None:
        x += added
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * residual_stride + cols, mask=inside, other=0.0).to(tl.float32)
        # As a sum that is stored and then read: the norm's bits are those of an addition before it.
        x = x.to(residual_ptr.dtype.element_ty).to(tl.float32)
    if sum_ptr is not None:
        tl.store(sum_ptr + row * C + cols, x.to(sum_ptr.dtype.element_ty), mask=inside)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / C, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps)
    if weight_ptr is not None:
        y *= weight
    if bias_ptr is not None:
        y += bias
    if scale_ptr is None:
        tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        rounded = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        store_scaled(rounded, y_ptr, scale_ptr, row, cols, C)
