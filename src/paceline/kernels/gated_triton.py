# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton side of kernels/gated.py: BLOCK channels of one row a program, all of them where they are to be scaled."""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.kernels.gemv_triton import activate
from paceline.kernels.scaled_linear_triton import store_scaled


@triton.jit
def gate(
    x_ptr,  # [T, 2 C], rows x_stride apart: gate, up
    y_ptr,  # [T, C], contiguous
    scale_ptr,  # float32 [T], and y is in fp8; None: y is in x's dtype
    x_stride,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_ptrs, inside = x_ptr + row * x_stride + cols, cols < C
    gate = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptrs + C, mask=inside, other=0.0).to(tl.float32)
    y = (activate(gate, ACTIVATION) * up).to(x_ptr.dtype.element_ty)
    if scale_ptr is None:
        tl.store(y_ptr + row * C + cols, y, mask=inside)
    else:
        store_scaled(y.to(tl.float32), y_ptr, scale_ptr, row, cols, C)
