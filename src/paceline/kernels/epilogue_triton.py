# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What follows a product, over its result: the Triton side of kernels/gated.py and kernels/epilogue.py. A program has
BLOCK channels of one row, all of them where they are to be scaled."""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.kernels.gemv_triton import activate
from paceline.kernels.scaled_linear_triton import store_scaled


@triton.jit
def epilogue_kernel(
    x_ptr,  # [T, C], rows x_stride apart; GATED: [T, 2 C], gate and up
    y_ptr,  # [T, C], rows y_stride apart; x itself where not GATED, if need be
    scale_ptr,  # float32 [T], and y is in fp8; None: y is in x's dtype
    bias_ptr,  # as wide as x; None: none
    residual_ptr,  # [T, C], rows residual_stride apart, added last; None: none
    x_stride,
    y_stride,
    residual_stride,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_ptrs, inside = x_ptr + row * x_stride + cols, cols < C
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    if GATED:  # asked for before the activation has to wait for the gate
        up = tl.load(x_ptrs + C, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = activate(x, ACTIVATION)
    if GATED:
        if bias_ptr is not None:
            up += tl.load(bias_ptr + C + cols, mask=inside, other=0.0).to(tl.float32)
        y *= up
    if residual_ptr is not None:
        y += tl.load(residual_ptr + row * residual_stride + cols, mask=inside, other=0.0).to(tl.float32)
    y = y.to(x_ptr.dtype.element_ty)
    if scale_ptr is None:
        tl.store(y_ptr + row * y_stride + cols, y, mask=inside)
    else:
        store_scaled(y.to(tl.float32), y_ptr, scale_ptr, row, cols, C)
